"""The second, smaller generator beside the first."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from miniature import smaller, wording
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.prompt_cache import fingerprint
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.families import SD3

SHARED = ("vae", *SD3.text_parts, "scheduler")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusion3Pipeline.from_pretrained(smaller.SMALLER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


@pytest.mark.parametrize("part", SHARED)
def test_it_shares_every_part_with_the_first_but_the_transformer(part):
    theirs = files(smaller.FIRST / part)
    assert theirs and files(smaller.SMALLER / part) == theirs


def test_prompt_embeddings_of_the_first_are_found_for_it():
    assert fingerprint(smaller.SMALLER, SD3.text_parts) == fingerprint(smaller.FIRST, SD3.text_parts)


def test_it_has_fewer_blocks_and_the_same_inputs_and_outputs(pipeline):
    load = smaller.SD3Transformer2DModel.load_config
    ours, theirs = pipeline.transformer.config, load(smaller.FIRST, subfolder="transformer")
    assert ours.num_layers == len(pipeline.transformer.transformer_blocks) < theirs["num_layers"]
    same = ("in_channels", "out_channels", "patch_size", "sample_size", "joint_attention_dim", "pooled_projection_dim")
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


def test_it_makes_pictures(pipeline):
    images = pipeline(
        ["a red circle on white", "two blue squares on black"],
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=wording.LENGTH,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all() and images.std() > 0.05


def test_the_package_loads_it(pipeline):
    generator = Generator.load(ModelRecipe(str(smaller.SMALLER), "float32", 64, wording.LENGTH), CPU)
    assert len(generator.transformer.transformer_blocks) == len(pipeline.transformer.transformer_blocks)
    assert generator.latent_shape == (16, 8, 8)


def test_a_network_pruned_of_nothing_is_the_same_network(pipeline):
    whole = pipeline.transformer.eval()
    copy = smaller.prune(whole, tuple(range(whole.config.num_layers))).eval()
    inputs = (torch.randn(2, 16, 8, 8), torch.randn(2, 26, 192), torch.randn(2, 256), torch.tensor([900.0, 100.0]))
    with torch.no_grad():
        assert torch.equal(copy(*inputs).sample, whole(*inputs).sample)


def test_the_last_block_is_always_kept(pipeline):
    with pytest.raises(RuntimeError):
        smaller.prune(pipeline.transformer, (0, 1, 2))
