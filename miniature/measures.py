"""The miniature's truths as measures for recipes: `evaluation.metrics: [miniature.measures:checker, ...]`."""

import torch
from torch import Tensor

from miniature import checker as exact
from miniature import scenes


def checker(images: Tensor, prompts: list[str]) -> Tensor:
    """Strict yes (1) or no (0) of the exact checker."""
    return exact.check_captions(prompts, images)[0]


def checker_share(images: Tensor, prompts: list[str]) -> Tensor:
    """Share of each caption's facts that hold."""
    return exact.check_captions(prompts, images)[1]


def true_aesthetic(images: Tensor, prompts: list[str]) -> Tensor:
    """The world's true aesthetic score, 1 to 10."""
    return scenes.true_aesthetic(images)


def colourfulness(images: Tensor, prompts: list[str]) -> Tensor:
    """Hasler and Suesstrunk's colourfulness (2003) of images in [0, 1]: a published measure that nothing was fitted to.

    Its unit is that of the paper, whose pictures have 256 levels: 33 is moderately, 59 quite, 82 highly colourful.
    """
    red, green, blue = (255 * images.float()).unbind(dim=1)
    opponents = red - green, (red + green) / 2 - blue
    spread = sum(opponent.var(dim=(1, 2), correction=0) for opponent in opponents)
    centre = sum(opponent.mean(dim=(1, 2)).square() for opponent in opponents)
    return torch.as_tensor(spread).sqrt() + 0.3 * torch.as_tensor(centre).sqrt()
