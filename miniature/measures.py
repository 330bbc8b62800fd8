"""The miniature's truths as measures for recipes: `evaluation.metrics: [miniature.measures:checker, ...]`."""

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
