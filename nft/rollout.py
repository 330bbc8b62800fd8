"""Rollouts: images (or stopped latents) sampled by the old policy, in micro batches."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stitchvm_reward.diffusion.generator import Conditions, Generator
from stitchvm_reward.diffusion.solvers import sigma_schedule, solve
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


@torch.no_grad()
def sample(
    generator: Generator,
    network: nn.Module,
    conditions: Conditions,
    noise: Tensor,
    sigmas: list[float],
    solver: str,
) -> Tensor:
    """Solve from `noise` (batch, c, h, w) down all of `sigmas` without guidance; float32 latents."""

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        level = torch.full((len(latents),), sigma, device=latents.device)
        return generator.velocity(latents, level, conditions, network)

    return solve(velocity, noise.to(generator.device), sigmas, solver)


def roll_out(
    generator: Generator,
    network: nn.Module,
    table: Conditions,
    rows: Tensor,
    samples: list[int],
    prompts: list[int],
    seed: int,
    epoch: int,
    steps: int,
    solver: str,
) -> Rollout:
    """Full rollouts of one micro batch, each sample from the noise at its own address."""
    noise = randomness.noise(generator.latent_shape, seed, randomness.ROLLOUT, epoch, samples)
    sigmas = sigma_schedule(steps, generator.shift)
    latents = sample(generator, network, table.select(rows), noise, sigmas, solver)
    tau = torch.zeros(len(samples), device=latents.device)
    return Rollout(samples, prompts, table, rows, latents, tau)


def training_levels(
    samples: list[int], tau: list[float], sigmas: list[float], count: int, kind: str, seed: int, epoch: int
) -> Tensor:
    """Noise levels to train each sample on, (batch, count) float32, all above its own tau.

    `grid`: the first `count` of a permutation of the solver's levels, one permutation per sample.
    `continuous`: uniform with t - tau >= .03.
    """
    rows = []
    for sample_index, stopped in zip(samples, tau, strict=True):
        generator = randomness.at(seed, randomness.LEVELS, epoch, sample_index)
        if kind == "grid":
            above = torch.tensor([sigma for sigma in sigmas if sigma > stopped])
            rows.append(above[torch.randperm(len(above), generator=generator)[:count]])
        else:
            least = stopped + 0.03
            rows.append(least + (1 - least) * torch.rand(count, generator=generator))
    return torch.stack(rows)
