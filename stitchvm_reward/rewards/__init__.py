"""Rewards of images: every one is `score(images, prompts) -> (batch,) float32`."""

import importlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from stitchvm_reward.errors import InputError, SharedError
from stitchvm_reward.rewards.aesthetic import AestheticReward
from stitchvm_reward.rewards.clip import TEXT_KINDS, ClipReward

KINDS = ("aesthetic", *TEXT_KINDS, "function")


class Reward(Protocol):
    """Scores (batch, 3, h, w) float32 images in [0, 1] with their prompts: (batch,) float32."""

    def score(self, images: Tensor, prompts: list[str]) -> Tensor: ...


def find_function(name: str) -> Callable[[Tensor, list[str]], Tensor]:
    """Import `package.module:function`. Raises InputError when it is not there."""
    module, _, attribute = name.partition(":")
    if not attribute or not module or module.startswith("."):
        raise InputError(f"a function is written package.module:function, got {name!r}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module may fail in any way while it is imported
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"cannot import {name} ({reason}); is it on PYTHONPATH?") from None
    if not callable(found):
        raise InputError(f"{name} is not a function")
    return found


class FunctionReward:
    """A user's own `function(images, prompts) -> (batch,)`, with its mistakes told by name."""

    def __init__(self, name: str):
        self.name, self.function = name, find_function(name)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        try:
            scores = self.function(images, prompts)
        except Exception as error:
            raise InputError(f"{self.name} raised {type(error).__name__}: {error}") from error
        if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
            given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(f"{self.name} must return a tensor of shape ({len(prompts)},), got {given}")
        return scores.to(torch.float32)


def load_reward(kind: str, model: str, head: str, function: str, device: torch.device) -> Reward:
    """Load one reward: `aesthetic` (CLIP model and head), one of TEXT_KINDS (CLIP model), `function` (a user's own).

    Raises InputError for another kind, or for a model, head or function that cannot be had.
    """
    if kind == "aesthetic":
        return AestheticReward(model, head, device)
    if kind in TEXT_KINDS:
        return ClipReward(model, kind, device)
    if kind == "function":
        return FunctionReward(function)
    raise InputError(f"a reward's kind must be one of {', '.join(KINDS)}, got {kind!r}")


def not_finite(name: str, scores: Tensor) -> str | None:
    """What to say of a reward of whose scores (count,) some are not finite, or None where all are."""
    bad = int((~scores.isfinite()).sum())
    return f"reward {name} gave {bad} of {len(scores)} scores that are not finite" if bad else None


def check_finite(name: str, scores: Tensor) -> None:
    """Raise SharedError when a reward gave a score that is not finite, on whatever process: `scores` are of all."""
    if (told := not_finite(name, scores)) is not None:
        raise SharedError(f"{told}; the run stops here")
