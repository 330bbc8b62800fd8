"""Rollouts: images (or stopped latents) sampled by the old policy, in micro batches."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.path import per_sample
from stitchvm_reward.diffusion.solvers import SOLVERS, solve_each
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.recipe import at_least, one_of, require
from stitchvm_reward.transfer import to_device

AUTO = "auto"


def require_size(name: str, size: Any) -> None:
    """Raise InputError unless a micro batch is a number of samples or auto."""
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    require(whole or size == AUTO, f"{name} must be a whole number from 1, or {AUTO}", size)


@dataclass
class RolloutRecipe:
    groups: int = 48
    """Prompts per epoch."""
    group_size: int = 24
    """Images per prompt."""
    micro_batch: Any = 8
    """Samples that a device rolls out and scores at once, or auto: the largest power of two that the plan says fits.
    Micro batches change speed and memory; of the results only the rounding."""
    steps: int = 10
    """Solver steps of a full rollout."""
    solver: str = "euler"
    """euler (neutral: evaluation uses it) or dpm2 (second order; overshoots the spread of the data at 10 steps)."""
    stop_window: list[int] = field(default_factory=list)
    """[first, last]: each group's rollouts stop after a number of steps drawn from it, and a value model scores the
    noisy latents there; the paper uses [12, 17] of 25 steps. Empty: full rollouts, decoded and scored as images."""

    def __post_init__(self):
        at_least("rollout.groups", self.groups, 1)
        at_least("rollout.group_size", self.group_size, 1)
        require_size("rollout.micro_batch", self.micro_batch)
        at_least("rollout.steps", self.steps, 2)
        one_of("rollout.solver", self.solver, SOLVERS)
        if self.stop_window:
            ordered = len(self.stop_window) == 2 and 1 <= self.stop_window[0] <= self.stop_window[-1] < self.steps
            require(
                ordered,
                f"rollout.stop_window must be [first, last] with 1 <= first <= last < rollout.steps ({self.steps})",
                self.stop_window,
            )


@dataclass(frozen=True)
class Rollout:
    """One micro batch of solver runs.

    `samples` are global indices and `prompts` prompt indices. `anchor` holds the float32 latents (batch, c, h, w) at
    level `tau` (batch,), and `taus` the same levels as numbers, which planning reads without asking the device.
    `table` holds what the network reads of each of the epoch's prompts, once, and `rows` (batch,) is this batch's
    places in it; without `rows` the table is this batch's own. `weight` is 0 for a stand-in that only keeps processes
    in step. Rewards by name, and what the objective makes of them, `worth` (batch,), are missing until they are known.
    Where solver steps are stochastic and trained on, `path` (batch, steps + 1, c, h, w) holds the latents before and
    after each of them, and `log_probs` (batch, steps) their log-probabilities under the policy that took them.
    """

    samples: list[int]
    prompts: list[int]
    table: Conditions
    rows: Tensor | None
    anchor: Tensor
    tau: Tensor
    taus: list[float]
    weight: float = 1.0
    rewards: dict[str, Tensor] = field(default_factory=dict)
    worth: Tensor | None = None
    path: Tensor | None = None
    log_probs: Tensor | None = None

    @property
    def conditions(self) -> Conditions:
        """What the network reads for each sample."""
        return self.table if self.rows is None else self.table.select(self.rows)

    def gathered(self) -> "Rollout":
        """Return the rollout with a table of its own, which is not gathered again at every access."""
        return replace(self, table=self.conditions, rows=None)


def _joined(tensors: list[Tensor | None]) -> Tensor | None:
    """Return tensors that all micro batches have, or none, as one."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def recut(rollouts: list[Rollout], batches: list[list[int]]) -> list[Rollout]:
    """Return rollouts of one epoch cut into other micro batches of the same samples, in the same order."""
    if [rollout.samples for rollout in rollouts] == batches:
        return rollouts
    samples = [n for rollout in rollouts for n in rollout.samples]
    prompts, taus = ([value for r in rollouts for value in getattr(r, name)] for name in ("prompts", "taus"))
    rows, anchor, tau = (torch.cat([getattr(r, name) for r in rollouts]) for name in ("rows", "anchor", "tau"))
    rewards = {name: torch.cat([r.rewards[name] for r in rollouts]) for name in rollouts[0].rewards}
    path, log_probs = (_joined([getattr(r, name) for r in rollouts]) for name in ("path", "log_probs"))
    found = []
    for batch in batches:
        part = slice(samples.index(batch[0]), samples.index(batch[-1]) + 1)
        found.append(
            Rollout(
                batch,
                prompts[part],
                rollouts[0].table,
                rows[part],
                anchor[part],
                tau[part],
                taus[part],
                rewards={name: values[part] for name, values in rewards.items()},
                path=None if path is None else path[part],
                log_probs=None if log_probs is None else log_probs[part],
            )
        )
    return found


def stand_in(table: Conditions, latent_shape: tuple[int, ...]) -> Rollout:
    """Return a rollout of weight zero, which lets a process without micro batches run the network as others do."""
    device = table.device
    zero = torch.zeros(1, device=device)
    row, anchor = torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, *latent_shape, device=device)
    return Rollout([0], [0], table, row, anchor, zero, [0.0], worth=zero, weight=0.0)


def stop_step(seed: int, epoch: int, group: int, window: list[int]) -> int:
    """Draw the step at which a group's rollouts stop, uniform in [first, last] (Stitched Value Model, C.4).

    It is addressed by epoch and group, so every process draws the same.
    """
    first, last = window
    return int(torch.randint(first, last + 1, (1,), generator=randomness.at(seed, randomness.STOPS, epoch, group)))


def rollout_stops(rollout: RolloutRecipe, seed: int, epoch: int, samples: list[int]) -> list[int]:
    """Return after how many solver steps each sample's rollout ends: all of them, or its group's draw."""
    if not rollout.stop_window:
        return [rollout.steps] * len(samples)
    groups = [n // rollout.group_size for n in samples]
    return [stop_step(seed, epoch, group, rollout.stop_window) for group in groups]


@torch.no_grad()
def sample(
    generator: Generator,
    network: nn.Module,
    conditions: Conditions,
    latents: Tensor,
    sigmas: list[float],
    *,
    solver: str = "euler",
    stops: list[int] | None = None,
) -> Tensor:
    """Solve from `latents` (batch, c, h, w) at sigmas[0] down all of `sigmas`, or each sample down to its own stop.

    There is no classifier-free guidance. Returns float32 latents.
    """
    remaining = conditions

    def velocity(latents: Tensor, sigma: float, rows: Tensor) -> Tensor:
        nonlocal remaining
        if len(rows) < len(remaining):  # some samples have arrived
            remaining = conditions.select(rows)
        level = torch.full((len(latents),), sigma, device=latents.device)
        return generator.velocity(latents, level, remaining, network)

    stops = stops or [len(sigmas) - 1] * len(latents)
    return solve_each(velocity, to_device(latents, generator.device), sigmas, solver, stops)


def plan_rollout(
    generator: Generator,
    samples: list[int],
    prompts: list[int],
    *,
    table: Conditions,
    rows: list[int],
    seed: int,
    epoch: int,
) -> Rollout:
    """Return a micro batch that has not been sampled yet: its latents are each sample's noise, at level 1.

    The noise is drawn on the CPU and its copy to the device only enqueued, so a micro batch can be planned while the
    device works on the one before.
    """
    noise = randomness.noise(generator.latent_shape, seed, randomness.ROLLOUT, epoch, samples)
    anchor = to_device(noise, generator.device)
    tau = torch.ones(len(samples), device=generator.device)
    places = to_device(torch.tensor(rows), generator.device)
    return Rollout(samples, prompts, table, places, anchor, tau, [1.0] * len(samples))


def roll_out(
    generator: Generator,
    network: nn.Module,
    planned: Rollout,
    sigmas: list[float],
    *,
    solver: str,
    stops: list[int],
) -> Rollout:
    """Return a planned micro batch with its latents: each sample from its noise down to its stop."""
    levels = torch.tensor([sigmas[stop] for stop in stops])
    tau = to_device(levels, generator.device)
    latents = sample(generator, network, planned.conditions, planned.anchor, sigmas, solver=solver, stops=stops)
    return replace(planned, anchor=latents, tau=tau, taus=levels.tolist())


def continue_rollout(
    generator: Generator, network: nn.Module, rollout: Rollout, rows: list[int], *, sigmas: list[float], solver: str
) -> Tensor:
    """Take some stopped samples of a rollout the rest of the way: clean latents (len(rows), c, h, w)."""
    starts = [int((torch.tensor(sigmas) - rollout.taus[row]).abs().argmin()) for row in rows]
    chosen = to_device(torch.tensor(rows), generator.device)
    latents, conditions = rollout.anchor[chosen], rollout.conditions.select(chosen)
    for start in sorted(set(starts)):
        members = [place for place, other in enumerate(starts) if other == start]
        places = to_device(torch.tensor(members), generator.device)
        part = latents[places]
        latents[places] = sample(generator, network, conditions.select(places), part, sigmas[start:], solver=solver)
    return latents


def last_steps(
    generator: Generator,
    network: nn.Module,
    conditions: Conditions,
    latents: Tensor,
    *,
    levels: Tensor,
    checkpointed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take Euler steps with gradient from `latents` (batch, c, h, w) down `levels` (steps + 1, batch), float64.

    Returns the float32 latents at the last level, as `sample` does, and where each step began and its velocity, both
    (steps, batch, c, h, w). Steps that are `checkpointed` keep only where they begin and are run again in the backward
    pass.
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
    samples: list[int], tau: list[float], sigmas: list[float], *, count: int, kind: str, seed: int, epoch: int
) -> Tensor:
    """Return noise levels to train each sample on, (batch, count) float32, all above its own tau.

    `grid`: the first `count` of a permutation of the solver's levels, one permutation per sample.
    `continuous`: uniform with t - tau >= 0.03.
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
