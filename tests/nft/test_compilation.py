"""Compiled networks: where they are compiled, whole graphs, and none that is made after the first epoch."""

from functools import partialmethod

import pytest
import torch
from torch._dynamo.utils import counters

from nft import compilation as decisions
from nft.compilation import compilation
from nft.config import PolicyModelRecipe
from nft.policy import Policy
from nft.scoring import Scorer
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.families import architecture_of
from stitchvm_reward.measure import compiled_regions
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.stitching.value_model import ValueNetwork
from tests.tiny_models import RESOLUTION, tiny_flux, tiny_sd3

TOKENS = 8
MINIATURE = "miniature/weights/sd3"


def epoch(generator: Generator, policy: Policy, model: str) -> None:
    """Rollouts and evaluation, full and last smaller batch, then training with the old policy and the reference."""
    for count in (4, 3):
        conditions = generator.family.stand_in(architecture_of(model), count, TOKENS)
        latents, sigma = torch.ones(count, *generator.latent_shape), torch.full((count,), 0.5)
        for adapter in ("old", "ema", None):
            with torch.no_grad(), policy.using(adapter):
                generator.velocity(latents, sigma, conditions)
        generator.velocity(latents, sigma, conditions).square().sum().backward()
    policy.blend("ema", 0.5)
    policy.copy("current", "old")


@pytest.fixture
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "checkpointing"),
    [
        (tiny_sd3, False),
        (tiny_flux, True),
        pytest.param(tiny_sd3, True, marks=pytest.mark.exhaustive),
        pytest.param(tiny_flux, False, marks=pytest.mark.exhaustive),
    ],
)
def test_blocks_have_no_graph_break_and_compile_nothing_after_the_first_epoch(
    write, checkpointing, tmp_path, nothing_compiled
):
    model = str(write(tmp_path / "model"))
    generator = Generator.load(ModelRecipe(model, "float32", RESOLUTION, TOKENS), torch.device("cpu"))
    policy = Policy(generator.transformer, 4, 8, list(generator.family.lora_targets), seed=0)
    if checkpointing:
        generator.transformer.enable_gradient_checkpointing()
    generator.compile_blocks(backend="eager")
    epoch(generator, policy, model)
    made = counters["stats"]["unique_graphs"]
    assert made >= 6 and not counters["graph_break"]
    epoch(generator, policy, model)
    assert counters["stats"]["unique_graphs"] == made
    assert counters["frames"]["total"] == counters["frames"]["ok"] and not counters["graph_break"]


@pytest.mark.slow
def test_value_models_are_compiled_whole_and_score_as_before(monkeypatch, nothing_compiled):
    monkeypatch.setattr(ValueNetwork, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    generator = Generator.load(ModelRecipe(MINIATURE, "float32", 64, TOKENS), torch.device("cpu"))
    conditions = generator.family.stand_in(architecture_of(MINIATURE), 4, TOKENS)
    scorer = Scorer([RewardRecipe(kind="value", value_model="miniature/weights/value/aesthetic")], [], generator.device)
    scorer.load_values(generator)
    latents = torch.randn(4, *generator.latent_shape, generator=torch.Generator().manual_seed(0))

    def scores(count: int) -> list[torch.Tensor]:
        inputs = latents[:count].clone().requires_grad_()
        found = scorer.value(inputs, torch.full((count,), 0.5), ["a"] * count, conditions)["total"]
        found.sum().backward()
        with torch.no_grad():
            again = scorer.value(latents[:count], torch.full((count,), 0.5), ["a"] * count, conditions)["total"]
        assert inputs.grad is not None
        return [found.detach(), again, inputs.grad]

    plain = [scores(count) for count in (4, 3)]
    assert counters["stats"]["unique_graphs"] == 0
    scorer.compile_values()
    torch.testing.assert_close([scores(count) for count in (4, 3)], plain, atol=1e-5, rtol=1e-4)
    assert compiled_regions(lambda: scores(2)) == 2 and not counters["graph_break"]
    assert counters["frames"]["total"] == counters["frames"]["ok"]


@pytest.mark.parametrize(
    ("compiled", "device", "zero", "deterministic", "missing", "on", "reason"),
    [
        (None, "cuda", 0, None, None, True, "the device is a GPU"),
        (None, "cuda", 2, False, None, True, "the device is a GPU"),
        (None, "cuda", 0, None, "a C compiler", False, "a C compiler is missing"),
        (None, "cuda", 0, True, None, False, "the batch sizes that come first"),
        (None, "cuda", 3, None, None, False, "hooks of ZeRO-3"),
        (None, "cpu", 0, None, None, False, "on GPUs only"),
        (True, "cpu", 3, True, "a C compiler", True, "model.compile is true"),
        (False, "cuda", 0, None, None, False, "model.compile is false"),
    ],
)
def test_null_compiles_where_it_can_and_says_why(
    compiled, device, zero, deterministic, missing, on, reason, monkeypatch
):
    monkeypatch.setattr(decisions, "missing_tool", lambda: missing)
    model = PolicyModelRecipe(MINIATURE, compile=compiled, deterministic=deterministic)
    found = compilation(model, torch.device(device), zero)
    assert found.on is on and reason in found.reason
    assert found.line().startswith(f"compile      {'on' if on else 'off'}: ")


def test_what_compiling_needs_on_a_gpu_is_named_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(decisions, "find_spec", lambda name: object())
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(decisions.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(decisions.shutil, "which", lambda name: None)
    assert decisions.missing_tool() == "a C compiler"
    monkeypatch.setenv("CC", "/opt/cc")
    assert decisions.missing_tool() is None
    (tmp_path / "Python.h").unlink()
    assert "python3-dev" in str(decisions.missing_tool())
    monkeypatch.setattr(decisions, "find_spec", lambda name: None)
    assert decisions.missing_tool() == "Triton"
