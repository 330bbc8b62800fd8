"""The untrained policy is evaluated once: what it makes is kept, and found again only where nothing has changed."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nft import untrained
from nft.config import load_recipe
from nft.held_out import HeldOut
from nft.models import load_generator
from nft.untrained import UntrainedLatents
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.families.family import Conditions
from tests.tiny import RECIPE, STOPPED

CPU = torch.device("cpu")
SIGMAS = [1.0, 0.5, 0.0]


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The batch sizes of all calls of the network that an evaluation or a picture makes."""
    sizes: list[int] = []
    images, velocity = HeldOut.images, Generator.velocity

    def watched_images(self, adapter, indices):
        with monkeypatch.context() as patch:
            patch.setattr(
                Generator, "velocity", lambda self, x, *rest: (sizes.append(len(x)), velocity(self, x, *rest))[1]
            )
            return images(self, adapter, indices)

    monkeypatch.setattr(HeldOut, "images", watched_images)
    return sizes


@pytest.mark.slow
def test_a_second_run_calls_the_network_for_no_image_of_epoch_0_and_has_the_same_rows(
    train, rows, calls, tmp_path, monkeypatch
):
    own = (f"evaluation.cache={tmp_path}/evaluations", "epochs=1", "evaluation.metrics=[]")
    train(tmp_path / "first", *own)
    assert calls == [4] * 2 * 2  # two steps before training and two after it; the pictures of the end are these
    calls.clear()
    train(tmp_path / "second", *own, *STOPPED, "lora.rank=2")  # another reward and policy, the same model and noise
    assert calls == [4] * 2
    first, second = rows(tmp_path / "first")[0], rows(tmp_path / "second")[0]
    assert first["held_out/aesthetic"] == second["held_out/aesthetic"]
    calls.clear()
    train(tmp_path / "none", *own, "evaluation.cache=''")
    assert calls == [4] * 2 * 2
    assert rows(tmp_path / "none") == rows(tmp_path / "first")
    assert (tmp_path / "none/before_after.png").read_bytes() == (tmp_path / "first/before_after.png").read_bytes()


def test_the_model_without_adapters_makes_the_images_of_the_untrained_policy_bit_for_bit(make_trainer, tmp_path):
    held_out = make_trainer(tmp_path / "run", "evaluation.cache=''").held_out
    assert torch.equal(held_out.images(None, [0, 1]), held_out.images("ema", [0, 1]))


@pytest.mark.slow
def test_a_run_that_starts_from_a_lora_file_is_evaluated_with_it(trained_run, make_trainer, tmp_path):
    file = trained_run[1] / "lora.safetensors"
    held_out = make_trainer(tmp_path / "run", f"lora.start={file}").held_out
    _, pictures = held_out.evaluate(0)
    before, after = held_out.before_and_after(0)
    assert torch.equal(after, pictures) and not torch.equal(before, after)


@pytest.mark.slow
def test_pictures_of_a_resumed_run_are_those_of_the_evaluations(trained_run, make_trainer, tmp_path):
    trainer, folder = trained_run
    again = make_trainer(
        folder, "epochs=2", "train.updates_per_epoch=2", "train.learning_rate=5e-3", "checkpoint.keep=2"
    )
    assert again.epoch == 2 and not again.held_out.grids
    for found, expected in zip(again.held_out.before_and_after(2), trainer.held_out.before_and_after(2), strict=True):
        assert torch.equal(found, expected)
    again.claim.close()


@pytest.fixture(scope="module")
def model_and_generator(overrides, tmp_path_factory):
    recipe = load_recipe(RECIPE, overrides(tmp_path_factory.mktemp("run")))
    return recipe.model, load_generator(recipe, CPU)


def batch(seed: int = 0) -> tuple[Conditions, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return Conditions({"tokens": torch.randn(2, 3, 4, generator=generator)}), torch.randn(2, 5, generator=generator)


def test_any_other_ingredient_is_another_entry(model_and_generator, tmp_path, monkeypatch):
    model, generator = model_and_generator
    conditions, noise = batch()

    def name(model=model, conditions=conditions, noise=noise, sigmas=SIGMAS) -> str:
        return UntrainedLatents(str(tmp_path), model, generator).path(conditions, noise, sigmas).name

    first, others = name(), {}
    others["noise"] = name(noise=noise + 1e-6)
    others["half a batch"] = name(noise=noise[:1])
    others["prompts"] = name(conditions=Conditions({"tokens": conditions["tokens"] * 2}))
    others["number format"] = name(conditions=conditions.to(CPU, torch.bfloat16))
    others["levels"] = name(sigmas=[1.0, 0.0])
    others["weights"] = name(dataclasses.replace(model, path="miniature/weights/sd3_small"))
    others["resolution"] = name(dataclasses.replace(model, resolution=128))
    for what, holder, attribute, value in (
        ("guidance", generator, "guidance", 2.0),
        ("dtype", generator, "dtype", torch.bfloat16),
        ("code", untrained, "code_digest", lambda: "another"),
        ("version", torch, "__version__", "0.0"),
        ("threads", torch, "get_num_threads", lambda: 97),
        ("precision", torch, "get_float32_matmul_precision", lambda: "medium"),
        ("deterministic", torch, "are_deterministic_algorithms_enabled", lambda: True),
        ("device", torch.backends.cpu, "get_cpu_capability", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(holder, attribute, value)
            others[what] = name()
    assert len({first, *others.values()}) == len(others) + 1, others
    assert name() == first


def test_a_copy_of_the_model_elsewhere_is_the_same_model(model_and_generator, tmp_path):
    model, generator = model_and_generator
    (tmp_path / "copy").symlink_to(Path(model.path).resolve(), target_is_directory=True)
    conditions, noise = batch()
    moved = dataclasses.replace(model, path=str(tmp_path / "copy"))
    paths = {UntrainedLatents("c", m, generator).path(conditions, noise, SIGMAS).name for m in (model, moved)}
    assert len(paths) == 1


def test_a_damaged_file_is_made_again(model_and_generator, tmp_path):
    cache, (conditions, noise) = UntrainedLatents(str(tmp_path), *model_and_generator), batch()
    assert torch.equal(cache.get(conditions, noise, SIGMAS, lambda: noise * 2), noise * 2)
    assert torch.equal(cache.get(conditions, noise, SIGMAS, lambda: noise * 3), noise * 2)
    cache.path(conditions, noise, SIGMAS).write_bytes(b"torn")
    assert torch.equal(cache.get(conditions, noise, SIGMAS, lambda: noise * 3), noise * 3)
