"""The generator on the bundled miniature."""

import gc

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import T5EncoderModel

from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.diffusion.solvers import solve
from stitchvm_reward.errors import InputError
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.hub import locate

MODEL = "miniature/weights/sd3"
CPU = torch.device("cpu")
PROMPTS = ["a red circle on white", "two blue squares, black background", "a Red circle on white"]


def recipe(path=MODEL, length=13):
    return ModelRecipe(path, "float32", 64, length)


def embeddings(cache, length=13):
    return PromptCache(recipe(length=length), str(cache), CPU)


def test_a_prompt_is_encoded_once_and_found_again_by_the_next_run(tmp_path):
    assert embeddings(tmp_path).ensure([*PROMPTS, *PROMPTS]) == len(PROMPTS)
    assert embeddings(tmp_path).ensure(PROMPTS) == 0


def test_another_length_or_wording_is_another_entry(tmp_path):
    first, longer = embeddings(tmp_path), embeddings(tmp_path, 9)
    assert first.path(PROMPTS[0]) != longer.path(PROMPTS[0])
    assert first.path(PROMPTS[0]) != first.path(PROMPTS[2])


def test_text_encoders_are_gone_after_encoding(tmp_path):
    gc.collect()
    before = sum(isinstance(thing, T5EncoderModel) for thing in gc.get_objects())
    embeddings(tmp_path).ensure(PROMPTS)
    gc.collect()
    assert sum(isinstance(thing, T5EncoderModel) for thing in gc.get_objects()) == before


def test_sampling_agrees_with_the_diffusers_pipeline(sampled, tmp_path):
    ours = embeddings(tmp_path)
    ours.ensure(PROMPTS[:2])
    conditions = ours.conditions(PROMPTS[:2])
    generator = Generator.load(recipe(), CPU)
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def velocity(latents, sigma):
        return generator.velocity(latents, torch.full((2,), sigma), conditions)

    images = generator.decode(solve(velocity, noise, generator.sigmas(6), "euler"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(MODEL, dtype=torch.float32)
    torch.testing.assert_close(images, sampled(pipeline, PROMPTS[:2], noise, 6), atol=1e-4, rtol=0)


def test_timesteps_are_not_rounded():
    generator = Generator.load(recipe(), CPU)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions = Conditions({"tokens": torch.zeros(1, 26, 192), "pooled": torch.zeros(1, 256)})
    with torch.no_grad():
        near, far = (generator.velocity(noise, torch.tensor([sigma]), conditions) for sigma in (0.7071, 0.7074))
    assert not torch.equal(near, far)


@pytest.mark.parametrize(("model", "told"), [("./nowhere", "not found"), ("a/b/c", "not found")])
def test_a_missing_folder_is_told_in_one_line(model, told):
    with pytest.raises(InputError, match=told):
        locate(model, ("vae",))


def test_a_folder_of_another_kind_is_told():
    with pytest.raises(InputError, match=r"model_index\.json is missing or damaged"):
        Generator.load(recipe("miniature/weights/clip"), CPU)
