"""The generator under guidance that moves particles, and what is known of a forward pass before it is run."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from stitchvm_reward.diffusion.backbone import HalfPass, join_passes
from stitchvm_reward.diffusion.generator import Conditions, Generator
from stitchvm_reward.diffusion.path import denoised
from stitchvm_reward.diffusion.solvers import sde_step, sigma_schedule
from stitchvm_reward.runs import randomness


@dataclass(frozen=True)
class Known:
    """What a value has already computed of some latents' next forward pass: their guided `velocity`, or the first
    blocks of a branch of it, under the prompt or under null text."""

    velocity: Tensor | None = None
    passes: dict[str, HalfPass] = field(default_factory=dict)

    def select(self, rows: Tensor | slice) -> "Known":
        """What is known of some of the latents, repeated as often as they are named."""
        velocity = None if self.velocity is None else self.velocity[rows]
        return Known(velocity, {branch: stands.select(rows) for branch, stands in self.passes.items()})

    def detach(self) -> "Known":
        """The same without gradient."""
        velocity = None if self.velocity is None else self.velocity.detach()
        return Known(velocity, {branch: stands.detach() for branch, stands in self.passes.items()})


def join(parts: list[Known]) -> Known:
    """What is known of several batches of latents, of all of them."""
    velocities = [part.velocity for part in parts if part.velocity is not None]
    passes = {branch: join_passes([part.passes[branch] for part in parts]) for branch in parts[0].passes}
    return Known(torch.cat(velocities) if velocities else None, passes)


@dataclass(frozen=True)
class Denoiser:
    """A generator under some prompts, and the chain of levels that it takes particles down.

    `prompts` have the `conditions` (one row each) and the `numbers` that address their noise. Latents of several
    particles lie prompt by prompt: of (prompts * particles, c, h, w), row n belongs to prompt n // particles.
    `negative` (one row) is what the unguided branch reads; `null_text` tells whether it is what the value models'
    backbone reads too.
    """

    generator: Generator
    prompts: list[str]
    numbers: list[int]
    conditions: Conditions
    negative: Conditions | None
    null_text: bool
    guidance: float
    steps: int
    stochasticity: float
    micro_batch: int
    seed: int

    @cached_property
    def sigmas(self) -> list[float]:
        """The levels, steps + 1 of them from 1 to 0."""
        return sigma_schedule(self.steps, self.generator.shift)

    def part(self, places: range) -> "Denoiser":
        """The denoiser of some of the prompts."""
        rows = torch.tensor(list(places), device=self.conditions.pooled.device)
        return replace(
            self,
            prompts=[self.prompts[place] for place in places],
            numbers=[self.numbers[place] for place in places],
            conditions=self.conditions.select(rows),
        )

    def batches(self, count: int) -> Iterator[tuple[range, slice]]:
        """The rows of (count, ...) latents in micro batches."""
        for start in range(0, count, self.micro_batch):
            stop = min(start + self.micro_batch, count)
            yield range(start, stop), slice(start, stop)

    def texts(self, rows: range, count: int) -> list[str]:
        """The prompts of some rows of `count` latents."""
        return [self.prompts[row // (count // len(self.prompts))] for row in rows]

    def conditions_of(self, rows: range, count: int) -> Conditions:
        """What the network reads for some rows of `count` latents."""
        # Made on the device: nothing is copied to it within the steps.
        places = torch.arange(rows.start, rows.stop, device=self.generator.device)
        return self.conditions.select(places // (count // len(self.prompts)))

    def usable(self, passes: dict[str, HalfPass]) -> dict[str, HalfPass]:
        """Those of a value's passes that are this network's own beginnings, by branch."""
        own = {branch: stands for branch, stands in passes.items() if stands.network is self.generator.transformer}
        return {branch: stands for branch, stands in own.items() if branch == "prompt" or self.null_text}

    def velocity(self, latents: Tensor, sigma: float, known: Known) -> Tensor:
        """Guided velocity (count, c, h, w) float32, of latents at one level."""
        if known.velocity is not None:
            return known.velocity
        count = len(latents)
        with torch.no_grad():
            parts = [
                self.guided(latents[place], sigma, rows, count, known.select(place))
                for rows, place in self.batches(count)
            ]
        return torch.cat(parts)

    def guided(self, latents: Tensor, sigma: float, rows: range, count: int, known: Known) -> Tensor:
        """Guided velocity, float32, of `latents`, the `rows` of `count`; with gradient where gradients are on."""
        told = self._branch("prompt", latents, sigma, self.conditions_of(rows, count), known)
        if self.negative is None:
            return told
        free = self._branch("null", latents, sigma, self.negative.expand(len(latents)), known)
        return free + self.guidance * (told - free)

    def _branch(self, name: str, latents: Tensor, sigma: float, conditions: Conditions, known: Known) -> Tensor:
        if name in known.passes:
            return known.passes[name].finish().float()
        level = torch.full((len(latents),), sigma, device=latents.device)
        return self.generator.velocity(latents, level, conditions).float()

    def start(self, particles: int) -> Tensor:
        """Noise at the first level, each particle's own."""
        return self._noise(0, particles, 1)

    def advance(self, latents: Tensor, velocity: Tensor, step: int, proposals: int = 1) -> Tensor:
        """Draw the next level's latents: (count * proposals, c, h, w), the proposals of one latent side by side.

        The noise belongs to the prompt, the particle and the step; the first proposal's is the same however many
        there are.
        """
        sigma, following = self.sigmas[step], self.sigmas[step + 1]
        clean = denoised(latents, velocity, torch.tensor(sigma))
        if self.stochasticity == 0:
            return sde_step(latents, clean, torch.zeros_like(latents), sigma, following, 0.0)
        noise = self._noise(step + 1, len(latents) // len(self.prompts), proposals)
        latents, clean = (tensor.repeat_interleave(proposals, 0) for tensor in (latents, clean))
        return sde_step(latents, clean, noise, sigma, following, self.stochasticity)

    def _noise(self, step: int, particles: int, proposals: int) -> Tensor:
        drawn = [
            torch.randn(
                proposals,
                *self.generator.latent_shape,
                generator=randomness.at(self.seed, randomness.STEERING, number, particle, step),
            )
            for number in self.numbers
            for particle in range(particles)
        ]
        return torch.cat(drawn).to(self.generator.device)
