"""Images that the generator draws to learn from: what they depend on, and what is kept of them."""

import pytest
import torch

from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.diffusion.solvers import solve
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs import randomness
from stitchvm_reward.stitching.check import check_stitch_recipe
from stitchvm_reward.stitching.config import load_stitch_recipe
from stitchvm_reward.stitching.generate import SHARD, GeneratedImages, shuffled_prompts
from stitchvm_reward.stitching.plan import plan_lines, work

RECIPE = "recipes/stitch/shapes_generated.yaml"
CPU = torch.device("cpu")


def recipe(tmp_path, *more, images=2 * SHARD):
    given = [f"data.generate.images={images}", "data.generate.steps=2", f"data.cache={tmp_path}/cache", *more]
    return load_stitch_recipe(RECIPE, given)


@pytest.mark.slow
def test_an_image_does_not_depend_on_how_many_there_are_or_on_what_was_drawn_before(tmp_path):
    first, other = GeneratedImages(recipe(tmp_path), CPU), GeneratedImages(recipe(tmp_path / "other", images=70), CPU)
    first.draw(first.missing())
    assert len(other.missing()) == 3 and first.missing() == []
    other.draw([1])  # alone, as a process does whose share it is
    assert other.missing() == [0, 2]
    assert torch.equal(first.latents([33, 40]), other.latents([33, 40]))
    assert first.caption(33) == other.caption(33) and not torch.equal(first.latents([33]), first.latents([34]))
    longer = GeneratedImages(recipe(tmp_path, images=70), CPU)
    assert longer.missing() == [2] and longer.key != first.key  # a larger number adds to what there is
    image = first.load(5, 64)
    assert image.shape == (3, 64, 64) and 0 <= float(image.min()) < float(image.max()) <= 1


@pytest.mark.slow
def test_a_share_of_the_images_has_each_guidance(tmp_path):
    plain = GeneratedImages(recipe(tmp_path), CPU)
    mixed = GeneratedImages(recipe(tmp_path, "data.generate.guidance=[1.0,3.0]"), CPU)
    assert plain.folder != mixed.folder
    for images in (plain, mixed):
        images.draw([0, 1])
    assert torch.equal(plain.latents([3]), mixed.latents([3]))
    # By hand: one image of the guided share, from the noise that its number addresses.
    made = recipe(tmp_path)
    cache = PromptCache(made.model, str(tmp_path / "prompts"), CPU)
    generator, row = Generator.load(made.model, CPU), SHARD + 4
    cache.ensure([mixed.caption(row), ""])
    prompted, empty = cache.conditions([mixed.caption(row)]), cache.conditions([""])

    def velocity(latents, sigma):
        level = torch.full((1,), sigma)
        unguided = generator.velocity(latents, level, empty)
        return unguided + 3.0 * (generator.velocity(latents, level, prompted) - unguided)

    noise = randomness.noise(generator.latent_shape, made.seed, randomness.GENERATION, 0, [row])
    with torch.no_grad():
        expected = solve(velocity, noise, generator.sigmas(2))
    torch.testing.assert_close(mixed.latents([row]), expected, rtol=2e-3, atol=2e-3)  # stored in half precision
    assert float((plain.latents([row]) - expected).abs().max()) > 0.1


@pytest.mark.slow
def test_a_distilled_model_is_given_the_scale(tmp_path):
    flux = ("model.path=miniature/weights/flux", "model.guidance=3.5")
    own = GeneratedImages(recipe(tmp_path, *flux, "data.generate.guidance=[]", images=SHARD), CPU)
    low = GeneratedImages(recipe(tmp_path, *flux, "data.generate.guidance=[1.0]", images=SHARD), CPU)
    assert own.guidance == [3.5] and own.distilled
    for images in (own, low):
        images.draw([0])
    assert not torch.equal(own.latents([0]), low.latents([0]))


def test_every_prompt_is_used_once_before_any_is_used_again():
    texts = [f"a {number}" for number in range(7)]
    drawn = shuffled_prompts(texts, 17, seed=0)
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == texts and drawn[:7] != drawn[7:14]
    assert shuffled_prompts(texts, 9, seed=0) == drawn[:9] != shuffled_prompts(texts, 9, seed=1)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.images=runs/shapes-images", "come either from data.images, .* or from the model"),
        ("data.generate.images=0", "come either from data.images, .* or from the model"),
        ("data.generate.guidance=[0.5]", r"data\.generate\.guidance must lie from 1 to 100, got 0\.5"),
        ("data.generate.prompts=''", "data.generate needs prompts"),
        ("data.generate.images=700", "data.generate.images must be at least 750: the held-out images"),
        ("data.generate.prompts=/nowhere.txt", "prompt file not found: /nowhere.txt"),
        ("data.limit=50", "data.limit is for data.images"),
    ],
)
def test_images_that_cannot_be_drawn_are_told_before_anything_is_loaded(tmp_path, override, told):
    with pytest.raises(InputError, match=told):
        check_stitch_recipe(load_stitch_recipe(RECIPE, [f"out={tmp_path}/run", override]))


@pytest.mark.slow
def test_the_plan_counts_a_second_forward_pass_for_guided_images_only(tmp_path):
    plain, mixed = (work(recipe(tmp_path, f"data.generate.guidance={g}"), 64) for g in ("[1.0]", "[1.0,3.0]"))
    assert plain["draw images"] == pytest.approx(mixed["draw images"] / 1.5, rel=0.05)
    assert {name: mixed[name] for name in plain if name != "draw images"} == {
        name: plain[name] for name in plain if name != "draw images"
    }
    whole = "\n".join(plan_lines(load_stitch_recipe("recipes/stitch/sd35m_aesthetic.yaml")))
    assert "20,000 images drawn of hf://datasets/ymhao/HPDv2/train.json" in whole and "about 1.2 GPU-hours" in whole
