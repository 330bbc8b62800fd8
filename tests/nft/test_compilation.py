"""Compiled blocks: whole graphs, and none that is made after the first epoch."""

import pytest
import torch
from torch._dynamo.utils import counters

from nft.policy import Policy
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.families import architecture_of
from tests.tiny_models import RESOLUTION, tiny_flux, tiny_sd3

pytestmark = pytest.mark.slow
TOKENS = 8


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


@pytest.mark.parametrize("write", [tiny_sd3, tiny_flux])
def test_blocks_have_no_graph_break_and_compile_nothing_after_the_first_epoch(write, tmp_path):
    model = str(write(tmp_path / "model"))
    torch._dynamo.reset()
    counters.clear()
    generator = Generator.load(ModelRecipe(model, "float32", RESOLUTION, TOKENS), torch.device("cpu"))
    policy = Policy(generator.transformer, 4, 8, list(generator.family.lora_targets), seed=0)
    generator.transformer.enable_gradient_checkpointing()
    generator.compile_blocks(backend="eager")
    epoch(generator, policy, model)
    made = counters["stats"]["unique_graphs"]
    assert made >= 6 and not counters["graph_break"]
    epoch(generator, policy, model)
    assert counters["stats"]["unique_graphs"] == made
    assert counters["frames"]["total"] == counters["frames"]["ok"] and not counters["graph_break"]
