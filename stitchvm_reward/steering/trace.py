"""A record of steering, step by step."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Event:
    """The `values` (prompts, particles) after `step` steps, at level `sigma`.

    If the particles were resampled, `effective` (prompts,) is the effective sample size of the weights that they were
    resampled with, and `ancestors` (prompts, particles) is the particle that each one continues.
    """

    step: int
    sigma: float
    values: Tensor
    effective: Tensor | None = None
    ancestors: Tensor | None = None


@dataclass(frozen=True)
class Steered:
    """The result for some prompts: `latents` (prompts, particles, c, h, w) at level 0, and the particles' `values` and
    normalised `weights` since the last resampling, both (prompts, particles)."""

    latents: Tensor
    values: Tensor
    weights: Tensor
    trace: list[Event] = field(default_factory=list)

    @property
    def chosen(self) -> Tensor:
        """The index of each prompt's best particle, (prompts,)."""
        return self.values.argmax(1)

    @property
    def best(self) -> Tensor:
        """The chosen latents, (prompts, c, h, w)."""
        return self.latents[torch.arange(len(self.latents)), self.chosen.to(self.latents.device)]

    @property
    def founders(self) -> Tensor:
        """The number of each prompt's first particles that have descendants at the end, (prompts,)."""
        prompts, particles = self.values.shape
        origins = torch.arange(particles).expand(prompts, -1)
        for event in self.trace:
            if event.ancestors is not None:
                origins = origins.gather(1, event.ancestors)
        return (origins.sort(1).values.diff(dim=1) > 0).sum(1) + 1

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the trace of each prompt in plain numbers."""
        traces = []
        for row in range(len(self.latents)):
            events = []
            for event in self.trace:
                entry: dict[str, Any] = {"step": event.step, "sigma": event.sigma, "values": event.values[row].tolist()}
                if event.effective is not None and event.ancestors is not None:
                    entry |= {"effective": float(event.effective[row]), "ancestors": event.ancestors[row].tolist()}
                events.append(entry)
            end = {"values": self.values[row].tolist(), "weights": self.weights[row].tolist()}
            traces.append({"events": events, "end": end, "chosen": int(self.chosen[row])})
        return traces
