"""Differentiable image preprocessing on tensors, within about a level of 255 of what PIL does to pictures.

All of it stays on the images' device. Images are (batch, 3, h, w) float32 in [0, 1] and stay so until `normalise`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of (batch, 3, h, w) in [0, 1], one axis at a time as PIL does.

    Each pass is clamped to [0, 1]: one joint pass differs from PIL by up to 14/255 at edges, two by about 1. Width
    comes first, as in every Pillow that the rewards were trained and published with. Pillow 13 takes the height first
    where it finds that faster, which for some tall pictures that are squashed changes what is cut off at hard edges,
    by up to 5/255.
    """
    for size in ((images.shape[-2], width), (height, width)):
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return images


def resize_and_crop(images: Tensor, side: int) -> Tensor:
    """Resize the shorter side to `side`, then cut the centre square, as transformers' CLIPImageProcessor does."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    images = resize(images, height * side // shorter, width * side // shorter)
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    return images[..., top : top + side, left : left + side]


def squash(images: Tensor, side: int) -> Tensor:
    """Resize to (side, side) whatever the proportions were: what DFN-CLIP was trained on."""
    return resize(images, side, side)


def pad_to_square(images: Tensor, side: int) -> Tensor:
    """Resize the longer side to `side` and centre the picture on black, as HPSv2's own code does.

    Lengths are rounded, halves to even; of an odd rest the right and the bottom get the larger part. Black is 0
    before `normalise`. HPSv2's code leaves out the padding where the longer side has the right length already, and
    then fails on what is not square: here it is always there.
    """
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    down, across = side - height, side - width
    return F.pad(resize(images, height, width), (across // 2, across - across // 2, down // 2, down - down // 2))


def normalise(images: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """Subtract the channel means and divide by the deviations."""
    means = torch.tensor(mean, device=images.device).view(1, 3, 1, 1)
    return (images - means) / torch.tensor(std, device=images.device).view(1, 3, 1, 1)
