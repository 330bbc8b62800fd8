"""Differentiable image preprocessing on tensors, close to what PIL does to pictures."""

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of (batch, 3, h, w) in [0, 1], one axis at a time as PIL does.

    Each pass is clamped to [0, 1]: one joint pass differs from PIL by up to 14/255 at edges, two by about 1.
    """
    for size in ((images.shape[-2], width), (height, width)):
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return images


def resize_and_crop(images: Tensor, side: int) -> Tensor:
    """Resize the shorter side to `side`, then cut the centre square."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    images = resize(images, height * side // shorter, width * side // shorter)
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    return images[..., top : top + side, left : left + side]


def normalise(images: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """Subtract the channel means and divide by the deviations."""
    means = torch.tensor(mean, device=images.device).view(1, 3, 1, 1)
    return (images - means) / torch.tensor(std, device=images.device).view(1, 3, 1, 1)
