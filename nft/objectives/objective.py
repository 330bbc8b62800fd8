"""What every training objective offers to the loop, the recipe and the plan."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nft.learner import Learner
from nft.rollout import Rollout, RolloutRecipe, roll_out
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.runs.rank_sync import RankSync
from stitchvm_reward.runs.recipe import at_least

LossCall = Callable[[], tuple[Tensor, Tensor]]


@dataclass
class ObjectiveSettings:
    """What all objectives read."""

    beta_kl: float = 1.0e-4
    """Weight of the mean squared distance to the base model's velocity (flow_grpo: of the divergence from where its
    stochastic steps end); 0 skips the base model's forward pass."""

    def check(self) -> None:
        """Raise InputError for a value out of range."""
        at_least("train.beta_kl", self.beta_kl, 0)


@dataclass(frozen=True)
class Parts:
    """What an objective works with. `train` includes its settings, `score` gives the rewards of a rollout by name."""

    train: Any
    rollout: RolloutRecipe
    reward_names: list[str]
    seed: int
    generator: Generator
    learner: Learner
    ranks: RankSync
    score: Callable[[Rollout], dict[str, Tensor]]


@dataclass(frozen=True)
class Learned:
    """What an epoch's update came to.

    `rollouts` are as the update leaves them, with their rewards. `finite` tells whether all rewards are finite and
    `updated` whether the old policy follows. `histograms` are distributions to show beside the metrics.
    """

    rollouts: list[Rollout]
    metrics: dict[str, float]
    finite: bool = True
    updated: bool = True
    histograms: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleCost:
    """What an epoch asks of one sample in the update.

    `passes` are forward and backward passes, `frozen` the forward passes without gradient beside each of them,
    `solver_steps` the rollout's steps that are taken in the update, and `reward_gradient` tells whether the decoder and
    the rewards have a backward pass. `kept` are the latents that stay of the sample between rollout and update.
    """

    passes: float
    frozen: float
    solver_steps: int = 0
    reward_gradient: bool = False
    kept: int = 1


class Shapes(Protocol):
    """A recipe's networks without weights, on the meta device; see nft.cost.networks.Networks."""

    recipe: Any
    generator: Generator

    def conditions(self, count: int) -> Conditions: ...

    def latents(self, count: int) -> Tensor: ...

    def velocity(self, latents: Tensor, conditions: Conditions, adapter: str | None) -> Tensor: ...

    def score(self, images: Tensor) -> Tensor: ...

    def value(self, latents: Tensor) -> Tensor: ...


class Objective(ABC):
    """How rollouts become an update of the adapters.

    `terms` names the sums that each loss returns beside itself; `losses_per_sample` counts losses per sample and epoch.
    `remaining_steps` is how many of its last solver steps a rollout leaves to the update, and `scores_rollouts` tells
    whether rollouts are scored when they are collected. `gathered` counts the numbers per sample that processes
    exchange beside the rewards, and `syncs_per_update` the syncs beside one per micro batch.
    """

    settings: type[ObjectiveSettings]
    method: str
    terms: tuple[str, ...]
    gathered: int = 0
    syncs_per_update: int = 0
    scores_rollouts: bool = True
    losses_per_sample: int = 1
    remaining_steps: int = 0

    def __init__(self, parts: Parts):
        self.parts, self.learner, self.ranks, self.generator = parts, parts.learner, parts.ranks, parts.generator
        self.sigmas = parts.generator.sigmas(parts.rollout.steps)

    @staticmethod
    @abstractmethod
    def check(train: Any, rollout: RolloutRecipe) -> None:
        """Raise InputError for settings that do not fit each other."""

    @staticmethod
    @abstractmethod
    def cost(train: Any) -> SampleCost:
        """Return what an epoch asks of one sample."""

    @staticmethod
    @abstractmethod
    def describe(train: Any, rollout: RolloutRecipe, rounds: int) -> tuple[str, str]:
        """Return what is trained on, and what passes `rounds` micro batches come to, as the plan prints them."""

    @staticmethod
    @abstractmethod
    def training_pass(shapes: Shapes, batch: int) -> None:
        """Run the forward and backward pass of one loss of a micro batch, on tensors without values.

        The plan takes the memory of an update from it.
        """

    def roll_out(self, planned: Rollout, stops: list[int], epoch: int) -> Rollout:
        """Return a planned micro batch sampled by the active policy, each sample down to its own of the `stops`."""
        sampler, solver = self.learner.sampler, self.parts.rollout.solver
        return roll_out(self.generator, sampler, planned, self.sigmas, solver=solver, stops=stops)

    @abstractmethod
    def learn(self, rollouts: list[Rollout], epoch: int) -> Learned:
        """Update the adapters by an epoch's rollouts of this process, on all processes together.

        Raises SharedError where a reward or a gradient is not finite and the recipe does not say skip.
        """

    @abstractmethod
    def losses(self, rollout: Rollout, epoch: int) -> list[LossCall]:
        """Return the calls that compute a micro batch's summed losses; each also returns the sums of `terms`.

        All processes sync once, here or in the first call.
        """

    def progress(self, rollout: Rollout) -> dict[str, str]:
        """Return what the progress bar shows after a micro batch, without waiting for the device's work on it."""
        return {}

    def problem(self) -> str | None:
        """Return why the step at hand must not be applied, alike on all processes, or None."""
        return None


def per_sample_mean(values: Tensor) -> Tensor:
    """Return the mean over all but the first dimension, (batch,)."""
    return values.flatten(1).mean(1)


def summed(terms: list[tuple[float, Tensor]], share: float) -> tuple[Tensor, Tensor]:
    """Return the loss, the weighted terms summed over the batch, and the sums of all terms without gradient.

    `terms` are (weight, term), each term (batch,); one of weight 0 is only reported. Both results are multiplied by
    `share`, a rollout's own weight.
    """
    loss = sum(weight * term for weight, term in terms if weight)
    return torch.as_tensor(loss).sum() * share, torch.stack([term.detach().sum() for _, term in terms]) * share
