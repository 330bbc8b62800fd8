"""What a recipe does to fit a device changes memory and time, not what is learnt."""

from dataclasses import replace
from functools import partialmethod

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from miniature.images import write
from nft.config import load_recipe
from nft.cost.memory import memory
from nft.cost.plan import too_large
from nft.cost.shapes import costs
from nft.export.lora import read_lora
from nft.models import load_generator
from nft.preflight import check_recipe
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards import load_reward
from stitchvm_reward.stitching.value_model import ValueNetwork
from tests.tiny import STOPPED

EPOCHS = "epochs=1"


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("straight") / "run", EPOCHS)


def trained(trainer) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in trainer.learner.policy.tensors("current").values()])


def apart(first, second) -> float:
    """Mean distance of two policies, as a share of what one of them has learnt in a step or two.

    Adam's first steps are the gradient's sign: where that is all but zero, rounding turns single weights.
    """
    learnt = 1e-3
    return float((trained(first) - trained(second)).abs().mean()) / learnt


def test_checkpointing_and_slicing_train_the_same_policy(train, straight, tmp_path):
    trainer = train(tmp_path / "run", EPOCHS, "train.gradient_checkpointing=true", "model.vae_slicing=true")
    assert trainer.learner.generator.transformer.gradient_checkpointing and trainer.learner.generator.vae.use_slicing
    assert apart(trainer, straight) < 1e-4


def test_checkpointing_keeps_less_for_the_backward_pass(make_trainer, tmp_path):
    def kept(*more: str) -> int:
        trainer, sizes = make_trainer(tmp_path / "-".join(["run", *more]), *more), []
        rollout = trainer.collector.collect(0)[0]
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t)
        with hooks:
            trainer.learner.generator.velocity(rollout.anchor, torch.full((4,), 0.5), rollout.conditions)
        return sum(sizes)

    assert kept("train.gradient_checkpointing=true") < 0.2 * kept()


@pytest.mark.slow
def test_compiled_blocks_know_the_adapters_apart(make_trainer, tmp_path, monkeypatch):
    # What is compiled for which adapter is decided before code is generated: that part, the slow one, is left out.
    monkeypatch.setattr(Generator, "compile_blocks", partialmethod(Generator.compile_blocks, backend="eager"))
    runs = [make_trainer(tmp_path / name, f"model.compile={name}") for name in ("false", "true")]
    found = []
    for trainer in runs:
        for tensor in trainer.learner.policy.tensors("current").values():
            tensor.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
        rollout, velocities = trainer.collector.collect(0)[0], []
        level = torch.full((4,), 0.7)
        for adapter in (None, "old", "current", None):
            with torch.no_grad(), trainer.learner.policy.using(adapter):
                velocities.append(trainer.learner.generator.velocity(rollout.anchor, level, rollout.conditions))
        trainer.learner.generator.velocity(
            rollout.anchor[:3], level[:3], rollout.conditions.select(torch.arange(3))
        ).sum().backward()
        gradient = torch.cat([tensor.grad.flatten() for tensor in trainer.learner.policy.tensors("current").values()])
        found.append((velocities, gradient))
    plain, compiled = found
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-3)
    reference, old, current, again = compiled[0]
    assert torch.equal(reference, again) and not torch.equal(current, reference) and not torch.equal(current, old)
    assert plain[1].abs().max() > 0


@pytest.mark.slow
def test_blocks_that_compile_again_after_the_first_epoch_are_counted_and_told(
    make_trainer, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(Generator, "compile_blocks", partialmethod(Generator.compile_blocks, backend="eager"))
    monkeypatch.setattr(ValueNetwork, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    trainer = make_trainer(tmp_path / "run", *STOPPED, "model.compile=true", "epochs=3")
    assert "model.compile is true" in "".join(capfd.readouterr())
    networks = [model.network for model in trainer.held_out.scorer.values.values()]
    assert networks and all(network._compiled_call_impl is not None for network in networks)
    assert "train/recompilations" not in trainer.run_epoch()
    assert trainer.run_epoch()["train/recompilations"] == 0
    assert "TORCH_LOGS" not in "".join(capfd.readouterr())
    torch._dynamo.reset()  # forgets what was compiled
    assert trainer.run_epoch()["train/recompilations"] > 0
    assert "new graphs in epoch 3" in "".join(capfd.readouterr())


@pytest.mark.slow
def test_moments_in_8_bits_learn_nearly_the_same_and_resume_bit_for_bit(train, digests, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")
    # Small matrices keep their moments in 32 bits: these have more than 4,096 numbers.
    small = ("train.optimizer=adamw_8bit", "lora.rank=32", "lora.alpha=64")
    trainer = train(tmp_path / "whole", "epochs=3", *small)
    states = trainer.learner.backend.optimizer.state_dict()["state"].values()
    assert any(t.dtype == torch.uint8 for state in states for t in state["__bnb_optimizer_quant_state__"].values())
    train(tmp_path / "parts", "epochs=2", *small)
    train(tmp_path / "parts", "epochs=3", *small)
    assert digests(tmp_path / "parts", 3) == digests(tmp_path / "whole", 3)
    whole = train(tmp_path / "whole-32", "epochs=3", *small[1:])
    assert 1e-4 < apart(trainer, whole) < 0.2


def test_a_missing_8_bit_library_is_told_before_anything_is_loaded(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr("nft.preflight.find_spec", lambda name: None)
    recipe = load_recipe("recipes/shapes/aesthetic.yaml", overrides(tmp_path / "run", "train.optimizer=adamw_8bit"))
    with pytest.raises(InputError, match="needs bitsandbytes: pip install"):
        check_recipe(recipe)


def test_the_autoencoder_decodes_in_bfloat16_nearly_as_in_float32(make_trainer, straight, tmp_path):
    trainer = make_trainer(tmp_path / "run", "model.vae_dtype=bfloat16")
    assert trainer.learner.generator.vae.dtype == torch.bfloat16
    latents = torch.randn(2, *straight.learner.generator.latent_shape, generator=torch.Generator().manual_seed(0))
    images, exact = trainer.learner.generator.decode(latents), straight.learner.generator.decode(latents)
    assert images.dtype == torch.float32
    assert 0 < (images - exact).abs().mean() < 0.02


@pytest.mark.slow
def test_a_bfloat16_decoder_is_laid_out_channels_last_and_keeps_the_ranks_of_scores(overrides, tmp_path):
    write(256, tmp_path / "scenes")
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((tmp_path / "scenes").glob("*.png"))]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    recipe = load_recipe("recipes/shapes/aesthetic.yaml", overrides(tmp_path / "run"))
    exact, small = (
        load_generator(replace(recipe, model=replace(recipe.model, vae_dtype=dtype)), torch.device("cpu"))
        for dtype in ("float32", "bfloat16")
    )
    kernels = [next(weight for weight in vae.parameters() if weight.ndim == 4) for vae in (exact.vae, small.vae)]
    assert [kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels] == [False, True]
    reward = load_reward(recipe.rewards[0], torch.device("cpu"))
    with torch.no_grad():
        latents = torch.cat([exact.encode(part) for part in images.split(64)])
        scores = [
            reward.score(torch.cat([generator.decode(part) for part in latents.split(64)]), [])
            for generator in (exact, small)
        ]
    assert not torch.equal(*scores) and spearmanr(*(score.numpy() for score in scores)).statistic >= 0.999


def test_training_goes_on_from_a_lora_file(make_trainer, straight, tmp_path):
    file = straight.folder / "lora.safetensors"
    trainer = make_trainer(tmp_path / "run", f"lora.start={file}")
    for adapter in ("current", "old", "ema"):
        found = trainer.learner.policy.tensors(adapter)
        for key, matrix in straight.learner.policy.tensors("ema").items():
            torch.testing.assert_close(found[key], matrix)
    assert trainer.learner.policy.old_is_current
    indices = [0, 1]
    torch.testing.assert_close(
        trainer.held_out.images("ema", indices), straight.held_out.images("ema", indices), atol=1e-5, rtol=0
    )
    assert (trainer.held_out.images("ema", indices) - trainer.held_out.images(None, indices)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("lora.rank=8",), "set lora.rank to the file's"),
        (("lora.targets=[attn.to_q]",), "set lora.targets to the layers of the file"),
    ],
)
def test_a_lora_file_of_another_shape_is_refused(make_trainer, straight, tmp_path, more, told):
    with pytest.raises(InputError, match=told):
        make_trainer(tmp_path / "run", f"lora.start={straight.folder / 'lora.safetensors'}", *more)
    assert not (tmp_path / "run").exists()


def test_a_lora_file_of_another_layout_is_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(InputError, match="LoRA file not found"):
        read_lora(tmp_path / "none.safetensors")
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1)}, tmp_path / "peft.safetensors")
    with pytest.raises(InputError, match="is in PEFT's layout"):
        read_lora(tmp_path / "peft.safetensors")
    layer = {f"transformer.x.lora_{part}.weight": torch.zeros(1, 1) for part in "AB"}
    save_file(layer | {"transformer.x.alpha": torch.zeros(1)}, tmp_path / "alpha.safetensors")
    with pytest.raises(InputError, match=r"nothing else; see transformer\.x\.alpha"):
        read_lora(tmp_path / "alpha.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 9)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        read_lora(tmp_path / "torn.safetensors")


def test_the_plan_counts_what_the_options_save():
    def phases(*more: str) -> dict[str, float]:
        return memory(load_recipe("recipes/shapes/aesthetic.yaml", list(more)))

    plain, small = phases(), phases("train.gradient_checkpointing=true", "model.vae_slicing=true")
    assert small["train"] < 0.6 * plain["train"] and small["decode"] < 0.7 * plain["decode"]
    adapter = costs(load_recipe("recipes/shapes/aesthetic.yaml")).adapter_parameters
    less = phases("train.optimizer=adamw_8bit")["train"]
    assert (plain["train"] - less) * 2**30 == pytest.approx(adapter * 6)
    assert phases("model.vae_dtype=bfloat16")["decode"] < 0.8 * plain["decode"]
    larger = phases("rollout.micro_batch=64")
    assert larger["train"] > 1.5 * plain["train"] and larger["optimizer"] == plain["optimizer"]
    in_rounds = phases("prompts.cache_limit=1e-3")  # later rounds are encoded beside the generator
    assert in_rounds["encode"] > plain["encode"] + 0.5 * plain["optimizer"]
    assert in_rounds | {"encode": plain["encode"]} == plain


def test_a_run_that_does_not_fit_is_told_with_what_cuda_takes_beside_it():
    # 23 GiB of tensors, half a GiB of context and a reserve of a twentieth.
    assert too_large({"rollout": 8.0, "train": 22.0}, 24) is None
    assert (too_large({"rollout": 8.0, "train": 23.0}, 24) or "").startswith("train needs about 24.7 GiB, this device")
