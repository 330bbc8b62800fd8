"""Rollouts: images (or stopped latents) sampled by the old policy, in micro batches."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stitchvm_reward.diffusion.generator import Conditions, Generator
from stitchvm_reward.diffusion.path import per_sample
from stitchvm_reward.diffusion.solvers import solve_each
from stitchvm_reward.runs import randomness


@dataclass
class Rollout:
    """One micro batch of finished solver runs.

    `samples` are global indices, `prompts` prompt indices, `anchor` the float32 latents (batch, c, h, w) at level
    `tau` (batch,). `table` holds what the network reads of each of the epoch's prompts, once, and `rows` (batch,)
    this batch's places in it. `weight` is 0 for a stand-in that only keeps processes in step. Rewards by name, then
    optimality r, are filled in later.
    """

    samples: list[int]
    prompts: list[int]
    table: Conditions
    rows: Tensor
    anchor: Tensor
    tau: Tensor
    weight: float = 1.0
    rewards: dict[str, Tensor] = field(default_factory=dict)
    optimality: Tensor | None = None

    @property
    def conditions(self) -> Conditions:
        return self.table.select(self.rows)


def stop_step(seed: int, epoch: int, group: int, window: list[int]) -> int:
    """The step at which a group's rollouts stop, uniform in the window [first, last] (Stitched Value Model, C.4).

    Addressed by epoch and group, so every process draws the same.
    """
    first, last = window
    return int(torch.randint(first, last + 1, (1,), generator=randomness.at(seed, randomness.STOPS, epoch, group)))


@torch.no_grad()
def sample(
    generator: Generator,
    network: nn.Module,
    conditions: Conditions,
    latents: Tensor,
    sigmas: list[float],
    solver: str,
    stops: list[int] | None = None,
) -> Tensor:
    """Solve from `latents` (batch, c, h, w) at sigmas[0] down all of `sigmas`, or each sample down to its stop.

    Without guidance; float32 latents.
    """

    own = conditions

    def velocity(latents: Tensor, sigma: float, rows: list[int]) -> Tensor:
        nonlocal own
        if len(rows) < len(own.pooled):  # some have arrived
            own = conditions.select(torch.tensor(rows, device=latents.device))
        level = torch.full((len(latents),), sigma, device=latents.device)
        return generator.velocity(latents, level, own, network)

    stops = stops or [len(sigmas) - 1] * len(latents)
    return solve_each(velocity, latents.to(generator.device), sigmas, solver, stops)


def roll_out(
    generator: Generator,
    network: nn.Module,
    table: Conditions,
    rows: Tensor,
    samples: list[int],
    prompts: list[int],
    seed: int,
    epoch: int,
    sigmas: list[float],
    solver: str,
    stops: list[int],
) -> Rollout:
    """Rollouts of one micro batch, each from the noise at its own address down to the level sigmas[stop]."""
    noise = randomness.noise(generator.latent_shape, seed, randomness.ROLLOUT, epoch, samples)
    latents = sample(generator, network, table.select(rows), noise, sigmas, solver, stops)
    tau = torch.tensor([sigmas[stop] for stop in stops], device=latents.device)
    return Rollout(samples, prompts, table, rows, latents, tau)


def roll_on(
    generator: Generator, network: nn.Module, rollout: Rollout, rows: list[int], sigmas: list[float], solver: str
) -> Tensor:
    """Take some stopped samples the rest of the way: clean latents (len(rows), c, h, w)."""
    starts = [int((torch.tensor(sigmas) - float(rollout.tau[row])).abs().argmin()) for row in rows]
    latents = rollout.anchor[rows].clone()
    for start in sorted(set(starts)):
        own = [place for place, found in enumerate(starts) if found == start]
        conditions = rollout.table.select(rollout.rows[[rows[place] for place in own]])
        latents[own] = sample(generator, network, conditions, latents[own], sigmas[start:], solver)
    return latents


def last_steps(
    generator: Generator,
    network: nn.Module,
    conditions: Conditions,
    latents: Tensor,
    levels: Tensor,
    checkpointed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Euler steps with gradient from `latents` (batch, c, h, w) down `levels` (steps + 1, batch), float64.

    Returns the float32 latents at the last level, as `sample` gives them, and what each step began from and its
    velocity, both (steps, batch, c, h, w). `checkpointed` steps keep only what they begin from and are run again in the
    backward pass.
    """
    states, velocities = [], []
    for level, following in zip(levels, levels[1:]):
        inputs = (latents, level, conditions, network)
        if checkpointed:
            velocity = checkpoint(generator.velocity, *inputs, use_reentrant=False)
        else:
            velocity = generator.velocity(*inputs)
        states.append(latents)
        velocities.append(velocity.float())
        latents = latents + per_sample((following - level).float(), latents) * velocities[-1]
    return latents, torch.stack(states), torch.stack(velocities)


def training_levels(
    samples: list[int], tau: list[float], sigmas: list[float], count: int, kind: str, seed: int, epoch: int
) -> Tensor:
    """Noise levels to train each sample on, (batch, count) float32, all above its own tau.

    `grid`: the first `count` of a permutation of the solver's levels, one permutation per sample.
    `continuous`: uniform with t - tau >= .03.
    """
    nearly = 1e-5  # tau is one of the levels, in single precision; the next level is much further
    rows = []
    for sample_index, stopped in zip(samples, tau, strict=True):
        generator = randomness.at(seed, randomness.LEVELS, epoch, sample_index)
        if kind == "grid":
            above = torch.tensor([sigma for sigma in sigmas if sigma > stopped + nearly])
            rows.append(above[torch.randperm(len(above), generator=generator)[:count]])
        else:
            least = stopped + 0.03
            rows.append(least + (1 - least) * torch.rand(count, generator=generator))
    return torch.stack(rows)
