"""Tensor preprocessing against the library's own, which works on PIL pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stitchvm_reward.rewards.preprocess import CLIP_MEAN, CLIP_STD, normalise, resize_and_crop

# PIL rounds to bytes twice, and cubic weights of absolute sum 1.25 carry the first rounding on: .5 * 1.25 + .5.
TOLERANCE = 1.13 / 255


def picture(height, width, seed):
    """A smooth random picture with some hard-edged blocks, (height, width, 3) bytes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    image = np.full((height, width, 3), 0.5)
    for _ in range(8):
        frequency, phase = rng.uniform(-25, 25, 2), rng.uniform(0, 6.3, 3)
        image += 0.12 * np.sin((frequency[0] * x + frequency[1] * y)[..., None] + phase)
    for _ in range(4):
        top, left = rng.integers(height - 8), rng.integers(width - 8)
        image[top : top + height // 5, left : left + width // 6] = rng.uniform(0, 1, 3)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def by_library(image, side, normalised=False):
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_normalize=normalised
    )
    return torch.from_numpy(np.asarray(processor(Image.fromarray(image))["pixel_values"][0], dtype=np.float32))


def as_tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 255


def difference(image, side):
    return (resize_and_crop(as_tensor(image), side)[0] - by_library(image, side)).abs().max().item()


@pytest.mark.parametrize("side", [64, 224])
@pytest.mark.parametrize("height, width", [(512, 384), (300, 450), (512, 512), (257, 401), (400, 250)])
def test_resize_and_crop_is_within_about_one_level_of_pil(height, width, side):
    for seed in range(2):
        assert difference(picture(height, width, seed), side) <= TOLERANCE


@pytest.mark.parametrize("height, width, side", [(64, 96, 224), (100, 100, 224), (48, 40, 64)])
def test_small_pictures_are_enlarged_as_by_pil(height, width, side):
    assert difference(picture(height, width, 3), side) <= TOLERANCE


def test_length_of_the_longer_side_is_rounded_as_by_the_library():
    # 784 * 64 / 392 is 128 exactly, and 127.99... when the scale is computed first.
    assert difference(picture(392, 784, 4), 64) <= TOLERANCE


def test_normalisation_is_the_librarys():
    image = picture(224, 224, 5)
    assert by_library(image, 224, normalised=True) == pytest.approx(normalise(as_tensor(image))[0].numpy(), abs=1e-5)
    assert len(CLIP_MEAN) == len(CLIP_STD) == 3


def test_a_picture_of_the_right_size_is_left_alone():
    image = as_tensor(picture(64, 64, 6))
    assert torch.equal(resize_and_crop(image, 64), image)


def test_batch_members_do_not_mix():
    images = torch.cat([as_tensor(picture(120, 90, seed)) for seed in (7, 8)])
    together = resize_and_crop(images, 64)
    torch.testing.assert_close(together[1:], resize_and_crop(images[1:], 64))


def test_gradient_reaches_the_pixels():
    image = (as_tensor(picture(128, 96, 9)) * 0.8 + 0.1).requires_grad_()
    normalise(resize_and_crop(image, 64)).square().sum().backward()
    assert image.grad.isfinite().all() and (image.grad != 0).float().mean() > 0.7
