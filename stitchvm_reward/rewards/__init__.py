"""Rewards of images: each has `score(images, prompts) -> (batch,) float32`."""

from typing import Protocol

import torch
from torch import Tensor

from stitchvm_reward.errors import SharedError
from stitchvm_reward.rewards.aesthetic import AestheticReward
from stitchvm_reward.rewards.clip import TEXT_KINDS, ClipReward
from stitchvm_reward.rewards.custom import FunctionReward, check_custom, find_function, load_custom
from stitchvm_reward.rewards.recipe import KINDS, RewardRecipe

__all__ = [
    "KINDS",
    "FunctionReward",
    "Reward",
    "RewardRecipe",
    "check_custom",
    "check_finite",
    "find_function",
    "load_reward",
    "not_finite",
]


class Reward(Protocol):
    """Scores (batch, 3, h, w) float32 images in [0, 1] with their prompts: (batch,) float32."""

    def score(self, images: Tensor, prompts: list[str]) -> Tensor: ...


def load_reward(reward: RewardRecipe, device: torch.device) -> Reward:
    """Load a reward of images. Raises InputError if its model, head, function or class is not available.

    A value model scores latents and is not loaded here; see `stitchvm_reward.steering.build.pixel_reward`.
    """
    dtype = getattr(torch, reward.dtype)
    if reward.kind == "aesthetic":
        return AestheticReward(reward.model, reward.head, device, dtype)
    if reward.kind in TEXT_KINDS:
        return ClipReward(reward.model, reward.kind, device, dtype)
    if reward.custom:
        return load_custom(reward, device)
    raise ValueError(f"a reward of images must be of another kind than {reward.kind!r}")


def not_finite(name: str, scores: Tensor) -> str | None:
    """Return a message if some of a reward's scores (count,) are not finite, or None."""
    bad = int((~scores.isfinite()).sum())
    return f"reward {name} gave {bad} of {len(scores)} scores that are not finite" if bad else None


def check_finite(name: str, scores: Tensor) -> None:
    """Raise SharedError if any of a reward's scores is not finite; `scores` are those of all processes."""
    if (message := not_finite(name, scores)) is not None:
        raise SharedError(f"{message}; the run stops here")
