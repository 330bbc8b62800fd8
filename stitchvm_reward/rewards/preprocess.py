"""Differentiable image preprocessing on tensors, within about 1/255 of what PIL computes.

Images are (batch, 3, h, w) float32 in [0, 1] on any device, in this range until `normalise`.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from stitchvm_reward.transfer import to_device

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize images (batch, 3, h, w) in [0, 1] by antialiased bicubic interpolation, one axis at a time as in PIL.

    Each pass is clamped to [0, 1]: at edges, a single joint pass differs from PIL by up to 14/255, two passes by about
    1/255. The width is resized first, as in every Pillow version that the rewards were trained and published with.
    Pillow 13 resizes the height first where that is faster, which changes hard edges of some tall, squashed images by
    up to 5/255.
    """
    for size in ((images.shape[-2], width), (height, width)):
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return images


def resize_and_crop(images: Tensor, side: int) -> Tensor:
    """Resize the shorter side to `side`, then crop the centre square, as transformers' CLIPImageProcessor does."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    images = resize(images, height * side // shorter, width * side // shorter)
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    return images[..., top : top + side, left : left + side]


def squash(images: Tensor, side: int) -> Tensor:
    """Resize to (side, side), whatever the aspect ratio: the input that DFN-CLIP was trained on."""
    return resize(images, side, side)


def pad_to_square(images: Tensor, side: int) -> Tensor:
    """Resize the longer side to `side` and centre the image on black, as HPSv2's own code does.

    Lengths are rounded, halves to even. If the margins cannot be equal, the right and bottom ones are larger. Black is
    0 before `normalise`. HPSv2's code omits the padding if the longer side already has the right length and then fails
    for images that are not square; here, images are always padded.
    """
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    down, across = side - height, side - width
    return F.pad(resize(images, height, width), (across // 2, across - across // 2, down // 2, down - down // 2))


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return float32 constants (1, 3, 1, 1) on a device, copied there once."""
    return to_device(torch.tensor(values).view(1, 3, 1, 1), device)


def normalise(images: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """Subtract the channel means and divide by the standard deviations."""
    return (images - _per_channel(tuple(mean), images.device)) / _per_channel(tuple(std), images.device)
