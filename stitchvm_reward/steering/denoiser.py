"""The guided generator that moves particles, and the parts of its next forward pass that are already computed."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.path import denoised
from stitchvm_reward.diffusion.solvers import sde2_step
from stitchvm_reward.families.family import Conditions, PartialForward, join_passes
from stitchvm_reward.runs import randomness


@dataclass(frozen=True)
class Known:
    """What a value has already computed of the next forward pass of some latents.

    This is their guided `velocity`, or the first blocks of a branch of the pass: "prompt", or "null" for the empty
    prompt.
    """

    velocity: Tensor | None = None
    passes: dict[str, PartialForward] = field(default_factory=dict)

    def select(self, rows: Tensor | slice) -> "Known":
        """Return what is known of some of the latents, which may be repeated."""
        velocity = None if self.velocity is None else self.velocity[rows]
        return Known(velocity, {branch: partial.select(rows) for branch, partial in self.passes.items()})

    def detach(self) -> "Known":
        """Return the same without gradient."""
        velocity = None if self.velocity is None else self.velocity.detach()
        return Known(velocity, {branch: partial.detach() for branch, partial in self.passes.items()})


def join(parts: list[Known]) -> Known:
    """Return what is known of several batches of latents as one."""
    velocities = [part.velocity for part in parts if part.velocity is not None]
    passes = {branch: join_passes([part.passes[branch] for part in parts]) for branch in parts[0].passes}
    return Known(torch.cat(velocities) if velocities else None, passes)


@dataclass(frozen=True)
class Particles:
    """Particles at one level, and what each of them takes along into its next step.

    `latents` are (count, c, h, w) float32. `previous` are the clean latents that the last step predicted, guidance by
    a value included, in the same layout; None before the first step, and for steps of first order. `known` is what is
    computed of the latents' next forward pass.
    """

    latents: Tensor
    previous: Tensor | None = None
    known: Known = field(default_factory=Known)

    def select(self, rows: Tensor) -> "Particles":
        """Return some of the particles, which may be repeated."""
        previous = None if self.previous is None else self.previous[rows]
        return Particles(self.latents[rows], previous, self.known.select(rows))


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A generator with some prompts, and the chain of levels along which it moves particles.

    `prompts` have `conditions` (one row each) and `numbers` that address their noise. The latents of several
    particles are ordered by prompt: row n of (prompts * particles, c, h, w) belongs to prompt n // particles.
    `negative` (one row) is what the unguided branch reads; it is None where there is no such branch. `null_text` is
    true if `negative` is also what the value models' backbone reads. `stochasticity` and `order` are those of
    `Settings`.
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
    order: int
    micro_batch: int
    seed: int

    @cached_property
    def sigmas(self) -> list[float]:
        """The levels, steps + 1 of them, from 1 to 0."""
        return self.generator.sigmas(self.steps)

    def part(self, places: range) -> "Denoiser":
        """Return the denoiser of some of the prompts."""
        rows = torch.tensor(list(places), device=self.conditions.device)
        return replace(
            self,
            prompts=[self.prompts[place] for place in places],
            numbers=[self.numbers[place] for place in places],
            conditions=self.conditions.select(rows),
        )

    def batches(self, count: int) -> Iterator[tuple[range, slice]]:
        """Yield the rows of (count, ...) latents in micro batches, as a range and as a slice."""
        for start in range(0, count, self.micro_batch):
            stop = min(start + self.micro_batch, count)
            yield range(start, stop), slice(start, stop)

    def texts(self, rows: range, count: int) -> list[str]:
        """Return the prompts of some rows of `count` latents."""
        return [self.prompts[row // (count // len(self.prompts))] for row in rows]

    def conditions_of(self, rows: range, count: int) -> Conditions:
        """Return the conditions of some rows of `count` latents."""
        # Created on the device, so that no step waits for a copy.
        places = torch.arange(rows.start, rows.stop, device=self.generator.device)
        return self.conditions.select(places // (count // len(self.prompts)))

    def usable(self, passes: dict[str, PartialForward]) -> dict[str, PartialForward]:
        """Return those of a value's passes, by branch, that begin this generator's own next pass."""
        return {
            branch: partial
            for branch, partial in passes.items()
            if partial.network is self.generator.transformer
            and partial.guidance == self.generator.guidance
            and (branch == "prompt" or self.null_text)
        }

    def velocity(self, latents: Tensor, sigma: float, known: Known) -> Tensor:
        """Return the guided velocity (count, c, h, w) float32 of latents at one level."""
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
        """Return the guided velocity, float32, of `latents`, which are the `rows` of `count`; differentiable."""
        prompted = self._branch("prompt", latents, sigma, self.conditions_of(rows, count), known)
        if self.negative is None:
            return prompted
        unprompted = self._branch("null", latents, sigma, self.negative.expand(len(latents)), known)
        return unprompted + self.guidance * (prompted - unprompted)

    def _branch(self, name: str, latents: Tensor, sigma: float, conditions: Conditions, known: Known) -> Tensor:
        if name in known.passes:
            return known.passes[name].finish().float()
        level = torch.full((len(latents),), sigma, device=latents.device)
        return self.generator.velocity(latents, level, conditions).float()

    def start(self, particles: int) -> Particles:
        """Return the noise at the first level; each particle has its own."""
        return Particles(self._noise(0, particles, 1))

    def advance(self, particles: Particles, velocity: Tensor, step: int, proposals: int = 1) -> Particles:
        """Draw the particles at the next level, count * proposals of them; proposals of one particle are adjacent.

        Prompt, particle and step address the noise; that of the first proposal does not depend on their number.
        """
        count = len(particles.latents)
        if self.stochasticity == 0:
            noise = torch.zeros_like(particles.latents).repeat_interleave(proposals, 0)
        else:
            noise = self._noise(step + 1, count // len(self.prompts), proposals)
        if proposals > 1:
            rows = torch.arange(count, device=noise.device).repeat_interleave(proposals)
            particles, velocity = Particles(particles.latents, particles.previous).select(rows), velocity[rows]
        return self.move(particles, velocity, noise, step)

    def move(self, particles: Particles, velocity: Tensor, noise: Tensor, step: int) -> Particles:
        """Return the particles at sigmas[step + 1], moved from sigmas[step] by `velocity` and `noise` of their layout.

        The step is of first order if the particles have no previous prediction.
        """
        sigma, following = self.sigmas[step], self.sigmas[step + 1]
        levels = (self.sigmas[step - 1] if step else None, sigma, following)
        clean = denoised(particles.latents, velocity, torch.tensor(sigma))
        latents = sde2_step(
            particles.latents, clean, particles.previous, noise, levels, stochasticity=self.stochasticity
        )
        return Particles(latents, clean if self.order == 2 else None)

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
