"""The FLUX-class generator: its parts, its guidance, and how it starts from the first generator."""

import json

import pytest
import torch
from diffusers import SD3Transformer2DModel

from miniature import flux, smaller, wording
from miniature.assemble import WEIGHTS
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.families import FLUX
from stitchvm_reward.families.flux import unpack
from stitchvm_reward.rewards import FunctionReward
from stitchvm_reward.runs import randomness

CPU = torch.device("cpu")
PROMPTS = (WEIGHTS.parent / "prompts/held_out.txt").read_text().splitlines()[:8]


def recipe(guidance: float | None = None) -> ModelRecipe:
    return ModelRecipe(str(flux.FOLDER), "float32", 64, wording.LENGTH, guidance)


@pytest.fixture(scope="module")
def conditions(tmp_path_factory):
    cache = PromptCache(recipe(), str(tmp_path_factory.mktemp("cache")), CPU)
    cache.ensure(PROMPTS)
    return cache.conditions(PROMPTS)


def test_parts_that_it_shares_with_the_first_generator_are_links_to_them():
    for name, source in flux.LINKS.items():
        assert (flux.FOLDER / name).resolve() == (smaller.FIRST / source).resolve()


@torch.no_grad()
def test_guidance_makes_its_pictures_better_and_the_default_is_the_trained_one(conditions):
    truth, scores = FunctionReward("miniature.measures:true_aesthetic"), {}
    noise = randomness.noise((16, 8, 8), 0, randomness.EVALUATION, 0, list(range(len(PROMPTS))))
    for guidance in (None, 1.0):
        generator = Generator.load(recipe(guidance), CPU)
        assert generator.family is FLUX and generator.guidance == (3.5 if guidance is None else guidance)
        latents = noise
        for sigma, following in zip(generator.sigmas(8), generator.sigmas(8)[1:]):
            level = torch.full((len(latents),), sigma)
            latents = latents + (following - sigma) * generator.velocity(latents, level, conditions)
        scores[guidance] = float(truth.score(generator.decode(latents), PROMPTS).mean())
    assert scores[None] > scores[1.0] + 0.3


def test_its_schedule_has_the_shift_of_the_first_generator_at_64_px():
    generator = Generator.load(recipe(), CPU)
    levels = [1 - n * 0.1 for n in range(10)]
    expected = [3 * level / (1 + 2 * level) for level in levels]
    assert generator.sigmas(10)[:-1] == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_an_untrained_network_predicts_as_the_first_generators_output_layer_does():
    teacher = SD3Transformer2DModel.from_pretrained(smaller.FIRST / "transformer").eval()
    network = flux.new_transformer().eval()
    flux.start_from(network, teacher)
    state = torch.randn(2, 16, 192)
    time = torch.randn(2, 192)
    ours = unpack(network.proj_out(network.norm_out(state, time)), (4, 4))
    theirs = teacher.proj_out(teacher.norm_out(state, time)).view(2, 4, 4, 2, 2, 16).permute(0, 5, 1, 3, 2, 4)
    assert torch.equal(ours, theirs.reshape(2, 16, 8, 8))


def test_the_quality_table_meets_what_was_wanted():
    table = json.loads((WEIGHTS.parent / "quality.json").read_text())
    assert table["flux"]["guidance 3.5"]["strict"] >= 0.4
