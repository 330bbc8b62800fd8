"""What steering did, step by step."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Event:
    """One look at the particles after `step` steps, at level `sigma`: `values` (prompts, particles).

    Where they were resampled, `effective` (prompts,) is the effective sample size before it and `ancestors` (prompts,
    particles) which particle each one goes on from.
    """

    step: int
    sigma: float
    values: Tensor
    effective: Tensor | None = None
    ancestors: Tensor | None = None


@dataclass(frozen=True)
class Steered:
    """What came of some prompts: `latents` (prompts, particles, c, h, w) at level 0, and of the same particles their
    `values` and their normalised `weights` since the last resampling, both (prompts, particles)."""

    latents: Tensor
    values: Tensor
    weights: Tensor
    trace: list[Event] = field(default_factory=list)

    @property
    def chosen(self) -> Tensor:
        """The place of each prompt's best particle, (prompts,)."""
        return self.values.argmax(1)

    @property
    def best(self) -> Tensor:
        """The chosen latents, (prompts, c, h, w)."""
        return self.latents[torch.arange(len(self.latents)), self.chosen.to(self.latents.device)]

    def as_dicts(self) -> list[dict[str, Any]]:
        """The trace of each prompt in plain numbers."""
        found = []
        for row in range(len(self.latents)):
            events = []
            for event in self.trace:
                told: dict[str, Any] = {"step": event.step, "sigma": event.sigma, "values": event.values[row].tolist()}
                if event.effective is not None and event.ancestors is not None:
                    told |= {"effective": float(event.effective[row]), "ancestors": event.ancestors[row].tolist()}
                events.append(told)
            end = {"values": self.values[row].tolist(), "weights": self.weights[row].tolist()}
            found.append({"events": events, "end": end, "chosen": int(self.chosen[row])})
        return found
