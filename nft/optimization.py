"""The optimizer of the adapters, and what a recipe says about optimization."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stitchvm_reward.runs.recipe import at_least, one_of, positive, require


@dataclass
class OptimizationSettings:
    updates_per_epoch: int = 1
    """Optimizer steps per epoch; each uses an equal share of the epoch's samples."""
    micro_batch: Any = None
    """Samples that a device trains on at once, or auto, as rollout.micro_batch, which is the default."""
    learning_rate: float = 3.0e-4
    """Peak rate of AdamW."""
    warmup: int = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 1.0e-4
    """Decoupled decay of AdamW."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.9
    """Ceiling of the evaluation average's decay."""
    on_nonfinite: str = "raise"
    """raise or skip: what happens, on all processes alike, where a reward or a gradient is not finite. Nothing of it is
    applied; skip continues with the next optimizer step."""
    most_skips: int = 3
    """Number of steps in a row that may be skipped."""
    optimizer: str = "adamw"
    """adamw, or adamw_8bit: moments in 8 bits, by bitsandbytes (installed by the extra `8bit`)."""
    gradient_checkpointing: bool = False
    """Keep only each block's input for the backward pass and run the block again there: a third more work in training,
    a small part of its memory."""

    def check_optimization(self) -> None:
        """Raise InputError for a value out of range."""
        at_least("train.updates_per_epoch", self.updates_per_epoch, 1)
        positive("train.learning_rate", self.learning_rate)
        at_least("train.warmup", self.warmup, 0)
        at_least("train.weight_decay", self.weight_decay, 0)
        positive("train.max_gradient_norm", self.max_gradient_norm)
        require(0 <= self.ema_decay < 1, "train.ema_decay must be in [0, 1)", self.ema_decay)
        one_of("train.on_nonfinite", self.on_nonfinite, ("raise", "skip"))
        at_least("train.most_skips", self.most_skips, 1)
        one_of("train.optimizer", self.optimizer, ("adamw", "adamw_8bit"))


def make_optimizer(settings: OptimizationSettings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW on float32 adapters, with moments in 32 or in 8 bits."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=rate, weight_decay=decay)
