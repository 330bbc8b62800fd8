"""Objectives that train the velocity at noised rollouts, whatever solver made them; full and stopped rollouts alike."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nft.objectives.compared import Compared, ComparedSettings, check_groups
from nft.objectives.objective import LossCall, Parts, SampleCost, Shapes, summed
from nft.rollout import Rollout, RolloutRecipe, training_levels
from stitchvm_reward.diffusion.path import bridge, per_sample
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.recipe import at_least, one_of, require
from stitchvm_reward.transfer import to_device

MOST_WEIGHT = 0.01  # of the KL term at a level, where the base model is run at some levels only


@dataclass
class MatchingSettings(ComparedSettings):
    levels: str = "grid"
    """Noise levels to train on: grid (the solver's own) or continuous (uniform)."""
    levels_per_sample: int = 1
    """Noise levels per sample and epoch, without repetition on the grid: most of a run's cost."""
    reference_share: float = 0.125
    """Share of the levels at which the base model is run for train.beta_kl. The term counts 1 / share times as much
    there, so that the expected loss is the same; train/kl is the estimate. 1: at all levels, as DiffusionNFT does."""

    def check(self) -> None:
        super().check()
        one_of("train.levels", self.levels, ("grid", "continuous"))
        at_least("train.levels_per_sample", self.levels_per_sample, 1)
        require(0 < self.reference_share <= 1, "train.reference_share must be in (0, 1]", self.reference_share)


@dataclass(frozen=True)
class Batch:
    """One micro batch at one noise level: what the loss compares.

    `velocity` (with gradient), `old`, `reference` (or None), `anchor`, `noise` and `noisy` are (batch, ...); the levels
    `t` > `tau` and the `worth` of each sample's rewards are (batch,).
    """

    velocity: Tensor
    old: Tensor
    reference: Tensor | None
    anchor: Tensor
    noise: Tensor
    noisy: Tensor
    t: Tensor
    tau: Tensor
    worth: Tensor


def in_share(share: float, seed: int, number: int) -> bool:
    """Return whether the pass of this number, counted over a run, is in a random share of all passes.

    A systematic sample: from a random start, at even distances. Each pass is in it with probability `share` over seeds,
    and any run of n passes has n * share of them within 1. It is the same for all samples, so a whole forward pass is
    left out, on all processes alike. Which noise level a sample has in a pass is random, so no level is left out.
    """
    start = randomness.at(seed, randomness.REFERENCE).initial_seed() / 2**63  # uniform in [0, 1]
    return math.floor((number + 1) * share + start) > math.floor(number * share + start)


def same_policy(train: Any) -> bool:
    """Return whether the old policy is the current one in every update."""
    return train.old_schedule == 0 and train.updates_per_epoch == 1


class Matching(Compared):
    """The velocity at `levels_per_sample` noise levels of each sample, beside the old policy's and the base model's."""

    terms: tuple[str, ...] = ("policy_loss", "kl", "old_deviation")

    def __init__(self, parts: Parts):
        super().__init__(parts)
        self.losses_per_sample = self.train.levels_per_sample

    @staticmethod
    @abstractmethod
    def compare(batch: Batch, train: Any) -> list[tuple[float, Tensor]]:
        """Return the loss's terms and their weights: those of `terms`, each (batch,) float32."""

    @staticmethod
    def check(train: Any, rollout: RolloutRecipe) -> None:
        check_groups(rollout)
        share = train.reference_share
        require(
            share == 1 or train.beta_kl <= MOST_WEIGHT * share,
            f"train.reference_share must be 1, or at least train.beta_kl / {MOST_WEIGHT:g}: at few levels the base "
            "model would count too much",
            share,
        )
        most = rollout.stop_window[0] if rollout.stop_window else rollout.steps
        require(
            train.levels == "continuous" or train.levels_per_sample <= most,
            f"train.levels_per_sample must be at most the {most} solver levels that every sample has above its own",
            train.levels_per_sample,
        )

    @staticmethod
    def cost(train: Any) -> SampleCost:
        reference = train.reference_share if train.beta_kl > 0 else 0
        return SampleCost(train.levels_per_sample, (0 if same_policy(train) else 1) + reference)

    @staticmethod
    @abstractmethod
    def loss_text(train: Any) -> str:
        """Return the settings of `compare` as the plan prints them."""

    @classmethod
    def describe(cls, train: Any, rollout: RolloutRecipe, rounds: int) -> tuple[str, str]:
        grid = train.levels == "grid"
        choice = f"{train.levels_per_sample} of {rollout.steps} grid" if grid else "continuous"
        some = (
            f" at {train.reference_share:.4g} of the levels" if train.beta_kl > 0 and train.reference_share < 1 else ""
        )
        return (
            f"{choice} levels per sample, {cls.loss_text(train)}, beta_kl {train.beta_kl:g}{some}",
            f"{rounds * train.levels_per_sample} forward and backward passes",
        )

    @classmethod
    def training_pass(cls, shapes: Shapes, batch: int) -> None:
        train, anchor, conditions = shapes.recipe.train, shapes.latents(batch), shapes.conditions(batch)
        noise, t = torch.zeros_like(anchor), anchor.new_zeros(batch)
        kept, added = bridge(per_sample(t, anchor), per_sample(t, anchor))
        noisy = kept * anchor + added * noise
        velocity = shapes.velocity(noisy, conditions, "current")
        with torch.no_grad():
            old = velocity.detach() if same_policy(train) else shapes.velocity(noisy, conditions, "old")
            reference = shapes.velocity(noisy, conditions, None) if train.beta_kl > 0 else None
        terms = cls.compare(Batch(velocity, old, reference, anchor, noise, noisy, t, t, t), train)
        summed(terms, 1.0)[0].backward()

    def losses(self, rollout: Rollout, epoch: int) -> list[LossCall]:
        levels, rollout = self.levels(rollout, epoch), rollout.gathered()
        # Drawn before the sync, while the device still works on the micro batch before.
        first = self.noise(rollout, epoch, 0)
        self.ranks.sync()
        return [
            partial(self.loss, rollout, levels[:, level], epoch, level, noise=None if level else first)
            for level in range(levels.shape[1])
        ]

    def levels(self, rollout: Rollout, epoch: int) -> Tensor:
        """Return the noise levels that each sample is trained on, (batch, levels_per_sample)."""
        levels = training_levels(
            rollout.samples,
            rollout.taus,
            self.sigmas,
            count=self.train.levels_per_sample,
            kind=self.train.levels,
            seed=self.parts.seed,
            epoch=epoch,
        )
        return to_device(levels, rollout.anchor.device)

    def noise(self, rollout: Rollout, epoch: int, level: int) -> Tensor:
        """Return the noise that a level's latents are made with, each sample's own, on the device."""
        address = self.parts.seed, randomness.TRAINING, epoch
        drawn = randomness.noise(self.generator.latent_shape, *address, rollout.samples, level)
        return to_device(drawn, rollout.anchor.device)

    def loss(
        self, rollout: Rollout, t: Tensor, epoch: int, level: int, *, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss at levels t (batch,) above each sample's tau, and the sums of its terms.

        `level` addresses the noise, which is drawn here unless it is given. The old policy's forward pass is skipped
        while it equals the current one, the base model's where beta_kl is 0.
        """
        anchor, conditions, learner = rollout.anchor, rollout.conditions, self.learner
        noise = self.noise(rollout, epoch, level) if noise is None else noise
        kept, added = bridge(per_sample(t, anchor), per_sample(rollout.tau, anchor))
        noisy = kept * anchor + added * noise
        velocity = self.generator.velocity(noisy, t, conditions, learner.network)
        same = learner.policy.old_is_current
        old = velocity.detach() if same else learner.frozen_velocity("old", noisy, t, conditions)
        share = self.train.reference_share
        compared = self.train.beta_kl > 0 and in_share(share, self.parts.seed, epoch * self.losses_per_sample + level)
        reference = learner.frozen_velocity(None, noisy, t, conditions) if compared else None
        assert rollout.worth is not None
        batch = Batch(velocity, old, reference, anchor, noise, noisy, t, rollout.tau, rollout.worth)
        policy, (weight, kl), *others = self.compare(batch, self.train)
        return summed([policy, (weight, kl / share), *others], rollout.weight)
