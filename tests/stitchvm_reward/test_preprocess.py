"""Tensor preprocessing against the rewards' original code, which works on PIL pictures."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stitchvm_reward.rewards.clip import FITS
from stitchvm_reward.rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    normalise,
    pad_to_square,
    resize_and_crop,
    squash,
)

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


@functools.cache
def natural(height, width, seed):
    """A picture with the statistics of a photograph, (height, width, 3) bytes: textures whose amplitude falls with
    frequency, on discs that cover each other."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(height, width))
    y, x = np.mgrid[:height, :width]

    def texture():
        waves = amplitude * np.exp(2j * np.pi * rng.random((3, height, width // 2 + 1)))
        channels = np.fft.irfft2(waves, (height, width))
        channels /= channels.std(axis=(1, 2), keepdims=True)
        return 0.7 * channels[:1] + 0.3 * channels

    image = 0.5 + 0.13 * texture()
    for _ in range(15):
        radius, row, column = (
            rng.uniform(0.03, 0.25) * min(height, width),
            rng.uniform(0, height),
            rng.uniform(0, width),
        )
        cover = np.clip(radius - np.hypot(y - row, x - column) + 0.5, 0, 1)
        image = image * (1 - cover) + (rng.uniform(0.1, 0.9, (3, 1, 1)) + 0.06 * texture()) * cover
    return (image.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def by_pillow(image, height, width):
    """What Pillow before 13 does in one call; 13 does the height first where that is faster."""
    passed = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(passed.resize((width, height), Image.Resampling.BICUBIC))


def squashed_by_pillow(image, side):
    return by_pillow(image, side, side)


def padded_by_pillow(image, side):
    """HPSv2's own code, on bytes: the longer side to `side`, both by round, then zeros around."""
    height, width = (round(length * side / max(image.shape[:2])) for length in image.shape[:2])
    canvas = np.zeros((side, side, 3), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = by_pillow(image, height, width)
    return canvas


def cropped_by_library(image, side):
    return (by_library(image, side) * 255).round().permute(1, 2, 0).numpy()


ORIGINALS = {
    "aesthetic": cropped_by_library,
    "clip": cropped_by_library,
    "dfn_clip": squashed_by_pillow,
    "hpsv2": padded_by_pillow,
    "pickscore": cropped_by_library,
}


def test_every_kind_has_an_original_to_be_compared_with():
    assert FITS.keys() == ORIGINALS.keys()


@pytest.mark.parametrize("kind", ORIGINALS)
@pytest.mark.parametrize("side", [224, 336, 378])
@pytest.mark.parametrize("height, width", [(768, 512), (512, 768), (640, 640)], ids=["portrait", "landscape", "square"])
def test_every_kind_reads_natural_pictures_as_its_original_code_does(kind, side, height, width):
    image = natural(height, width, 0)
    found = FITS[kind](as_tensor(image), side)[0].permute(1, 2, 0)
    original = torch.from_numpy(ORIGINALS[kind](image, side).astype(np.float32)) / 255
    assert found.shape == (side, side, 3)
    assert float((found - original).abs().max()) <= 1.1 / 255


@pytest.mark.parametrize("height, width", [(48, 64), (64, 48), (31, 64), (200, 64)])
def test_a_squashed_picture_shows_all_of_it_without_a_border(height, width):
    ramp = torch.linspace(0, 1, width).expand(1, 3, height, width)
    found = squash(ramp, 32)
    assert found.shape == (1, 3, 32, 32)
    assert float(found[..., 0].max()) < 0.1 and float(found[..., -1].min()) > 0.9
    assert float(squash(torch.ones(1, 3, height, width), 32).min()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "height, width, rows, columns",
    [
        (64, 48, slice(0, 32), slice(4, 28)),
        (48, 64, slice(4, 28), slice(0, 32)),
        (64, 46, slice(0, 32), slice(4, 27)),  # 23 columns of 32: four are left of it and five are right
        (64, 45, slice(0, 32), slice(5, 27)),  # 22.5 is rounded to the even 22
        (64, 47, slice(0, 32), slice(4, 28)),  # 23.5 to the even 24
        (32, 20, slice(0, 32), slice(6, 26)),  # a picture of the right length is padded too
        (500, 1, slice(0, 32), slice(15, 16)),  # and no picture vanishes
    ],
)
def test_a_padded_picture_stands_in_the_middle_of_zeros(height, width, rows, columns):
    found = pad_to_square(torch.ones(2, 3, height, width), 32)
    wanted = torch.zeros(2, 3, 32, 32)
    wanted[..., rows, columns] = 1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_the_padding_is_black_before_normalisation():
    found = normalise(pad_to_square(torch.ones(1, 3, 64, 32), 32))
    assert found[0, :, 0, 0].tolist() == pytest.approx([-m / s for m, s in zip(CLIP_MEAN, CLIP_STD)])


@pytest.mark.parametrize("kind", FITS)
def test_every_kinds_gradient_reaches_the_pixels(kind):
    image = (as_tensor(picture(128, 96, 9)) * 0.8 + 0.1).requires_grad_()
    normalise(FITS[kind](image, 64)).square().sum().backward()
    assert image.grad.isfinite().all() and (image.grad != 0).float().mean() > 0.7


@pytest.mark.parametrize("kind", FITS)
def test_every_kind_leaves_a_square_of_the_right_size_alone(kind):
    image = as_tensor(picture(64, 64, 6))
    assert torch.equal(FITS[kind](image, 64), image)
