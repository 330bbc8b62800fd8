"""Negative-aware fine-tuning (DiffusionNFT, arXiv 2509.16117), on full and on stopped rollouts."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nft.advantage import advantages, collapsed_groups, optimality
from nft.objectives.objective import (
    Learned,
    LossCall,
    Objective,
    ObjectiveSettings,
    Parts,
    SampleCost,
    Shapes,
    per_sample_mean,
    summed,
)
from nft.rollout import Rollout, RolloutRecipe, training_levels
from nft.statistics import gather_rewards, nonfinite_reward, report_rewards
from stitchvm_reward.diffusion.path import anchor_coefficients, bridge, bridge_velocity, per_sample
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.recipe import at_least, one_of, require
from stitchvm_reward.transfer import to_device

SPACES = ("anchor", "velocity")
MOST_WEIGHT = 0.01  # of the KL term at a level, where the base model is run at some levels only
SCALE = 5.0  # the advantage clip, so that at v = v_old the gradient is (2 r - 1) = A / 5 times SCALE: A itself


@dataclass
class NFTSettings(ObjectiveSettings):
    levels: str = "grid"
    """Noise levels to train on: grid (the solver's own) or continuous (uniform)."""
    levels_per_sample: int = 1
    """Noise levels per sample and epoch, without repetition on the grid: most of a run's cost."""
    reference_share: float = 0.125
    """Share of the levels at which the base model is run for train.beta_kl. The term counts 1 / share times as much
    there, so that the expected loss is the same; train/kl is the estimate. 1: at all levels, as DiffusionNFT does."""
    space: str = "anchor"
    """Loss on anchors with self-normalised weights (anchor) or on velocities (velocity)."""
    beta: float = 1.0
    """Strength of the implicit policies v+ and v-."""
    per_group_std: bool = False
    """Divide advantages by the standard deviation of the group instead of the epoch."""
    old_schedule: int = 1
    """How the old policy follows the current one: 0 at once; 1 rises to 0.5; 2 is zero until step 75, then rises to
    0.999 (the share that the old policy keeps of itself per epoch, DiffusionNFT)."""

    def check(self) -> None:
        super().check()
        one_of("train.levels", self.levels, ("grid", "continuous"))
        at_least("train.levels_per_sample", self.levels_per_sample, 1)
        one_of("train.space", self.space, SPACES)
        require(0 < self.reference_share <= 1, "train.reference_share must be in (0, 1]", self.reference_share)
        require(0 < self.beta <= 1, "train.beta must be in (0, 1]", self.beta)
        require(self.old_schedule in (0, 1, 2), "train.old_schedule must be 0, 1 or 2", self.old_schedule)


@dataclass(frozen=True)
class Batch:
    """One micro batch at one noise level: what the loss compares.

    `velocity` (with gradient), `old`, `reference` (or None), `anchor`, `noise` and `noisy` are (batch, ...); the levels
    `t` > `tau` and the `optimality` r in [0, 1] are (batch,).
    """

    velocity: Tensor
    old: Tensor
    reference: Tensor | None
    anchor: Tensor
    noise: Tensor
    noisy: Tensor
    t: Tensor
    tau: Tensor
    optimality: Tensor


def in_share(share: float, seed: int, number: int) -> bool:
    """Return whether the pass of this number, counted over a run, is in a random share of all passes.

    A systematic sample: from a random start, at even distances. Each pass is in it with probability `share` over seeds,
    and any run of n passes has n * share of them within 1. It is the same for all samples, so a whole forward pass is
    left out, on all processes alike. Which noise level a sample has in a pass is random, so no level is left out.
    """
    start = randomness.at(seed, randomness.REFERENCE).initial_seed() / 2**63  # uniform in [0, 1]
    return math.floor((number + 1) * share + start) > math.floor(number * share + start)


def _branch(difference: Tensor, weighted: bool) -> Tensor:
    """Return the mean squared error per sample, where `weighted` divided by its own detached mean absolute error."""
    if not weighted:
        return per_sample_mean(difference.square())
    scale = per_sample_mean(difference.detach().abs()).clamp_min(1e-5)
    return per_sample_mean(difference.square()) / scale


def nft_loss(batch: Batch, beta: float, space: str = "anchor") -> tuple[Tensor, Tensor, Tensor]:
    """Return the policy term, the KL term (unweighted) and the deviation from the old policy, each (batch,) float32.

    The positive and negative branches lie around the old policy (DiffusionNFT, arXiv 2509.16117, eq. 5):
    v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v. In anchor space each of them predicts the anchor,
    X = A z_t - B v, and is compared with it under a self-normalised weight; at tau = 0 this is DiffusionNFT's loss on
    denoised latents. In velocity space it is the unweighted form of Stitched Value Model, C.4, eq. 77.
    Policy term: 5 (r L+ + (1 - r) L-) / beta. Its value does not depend on r at v = v_old: never judge a run by it.
    All algebra is in float32. Raises ValueError for an unknown space.
    """
    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
    v, v_old, a = batch.velocity.float(), batch.old.detach().float(), batch.anchor.float()
    level, stopped = per_sample(batch.t, v), per_sample(batch.tau, v)
    positive, negative = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
    if space == "anchor":
        of_latent, of_velocity = anchor_coefficients(level, stopped)
        fixed = of_latent * batch.noisy.float() - a
        gains, losses = fixed - of_velocity * positive, fixed - of_velocity * negative
    else:
        target = bridge_velocity(a, batch.noise.float(), level, stopped)
        gains, losses = positive - target, negative - target
    weighted = space == "anchor"
    r = batch.optimality.to(v.device, torch.float32)
    policy = SCALE * (r * _branch(gains, weighted) + (1 - r) * _branch(losses, weighted)) / beta
    reference = batch.reference
    kl = torch.zeros_like(policy)
    if reference is not None:
        kl = per_sample_mean((v - reference.detach().float()).square())
    return policy, kl, per_sample_mean((v.detach() - v_old).square())


class NFT(Objective):
    """Scored rollouts become optimality, and optimality weighs the two branches of the loss."""

    settings = NFTSettings
    method = "reinforcement with the negative-aware objective of [DiffusionNFT](https://arxiv.org/abs/2509.16117)"
    terms: tuple[str, ...] = ("policy_loss", "kl", "old_deviation")
    gathered = 2  # the prompt of each sample, and the level at which its rollout stopped

    def __init__(self, parts: Parts):
        super().__init__(parts)
        self.train: NFTSettings = parts.train
        self.losses_per_sample = self.train.levels_per_sample

    @staticmethod
    def check(train: Any, rollout: RolloutRecipe) -> None:
        require(
            rollout.group_size >= 2,
            "rollout.group_size must be at least 2: a lone sample has no advantage",
            rollout.group_size,
        )
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
        # The old policy needs its own forward pass only while it differs from the current one.
        same_policy = train.old_schedule == 0 and train.updates_per_epoch == 1
        reference = train.reference_share if train.beta_kl > 0 else 0
        return SampleCost(train.levels_per_sample, (0 if same_policy else 1) + reference)

    @staticmethod
    def describe(train: Any, rollout: RolloutRecipe, rounds: int) -> tuple[str, str]:
        grid = train.levels == "grid"
        choice = f"{train.levels_per_sample} of {rollout.steps} grid" if grid else "continuous"
        some = (
            f" at {train.reference_share:.4g} of the levels" if train.beta_kl > 0 and train.reference_share < 1 else ""
        )
        return (
            f"{choice} levels per sample, {train.space} space, beta {train.beta:g}, beta_kl {train.beta_kl:g}{some}",
            f"{rounds * train.levels_per_sample} forward and backward passes",
        )

    @staticmethod
    def training_pass(shapes: Shapes, batch: int) -> None:
        train, anchor, conditions = shapes.recipe.train, shapes.latents(batch), shapes.conditions(batch)
        noise, t = torch.zeros_like(anchor), anchor.new_zeros(batch)
        kept, added = bridge(per_sample(t, anchor), per_sample(t, anchor))
        noisy = kept * anchor + added * noise
        velocity = shapes.velocity(noisy, conditions, "current")
        with torch.no_grad():
            same_policy = train.old_schedule == 0 and train.updates_per_epoch == 1
            old = velocity.detach() if same_policy else shapes.velocity(noisy, conditions, "old")
            reference = shapes.velocity(noisy, conditions, None) if train.beta_kl > 0 else None
        given = Batch(velocity, old, reference, anchor, noise, noisy, t, t, t)
        policy, kl, _ = nft_loss(given, train.beta, train.space)
        (policy + train.beta_kl * kl).sum().backward()

    def learn(self, rollouts: list[Rollout], epoch: int) -> Learned:
        samples = self.learner.geometry.samples
        rewards = gather_rewards(self.ranks, rollouts, self.parts.reward_names, samples)
        metrics = report_rewards(rewards, self.ranks)
        if (problem := nonfinite_reward(rewards)) is not None:
            self.learner.skip(f"{problem} in epoch {epoch + 1}")
            metrics["train/skipped"] = float(self.learner.skipped)
            return Learned(rollouts, metrics, finite=False, updated=False)
        groups = self.ranks.gather([(r.samples, torch.tensor(r.prompts)) for r in rollouts], samples).cpu()
        tau = self.ranks.gather([(r.samples, torch.tensor(r.taus)) for r in rollouts], samples).cpu()
        r = optimality(advantages(rewards["total"], groups, tau, self.train.per_group_std))
        metrics["train/collapsed_groups"] = collapsed_groups(rewards["total"], groups)
        metrics["train/optimality_std"] = float(r.std(correction=0))
        device = self.generator.device
        rollouts = [replace(rollout, optimality=to_device(r[rollout.samples], device)) for rollout in rollouts]
        metrics |= self.learner.update(rollouts, epoch, self)
        return Learned(rollouts, metrics, histograms={"optimality": r})

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
        same_policy = learner.policy.old_is_current
        old = velocity.detach() if same_policy else learner.frozen_velocity("old", noisy, t, conditions)
        share = self.train.reference_share
        compared = self.train.beta_kl > 0 and in_share(share, self.parts.seed, epoch * self.losses_per_sample + level)
        reference = learner.frozen_velocity(None, noisy, t, conditions) if compared else None
        assert rollout.optimality is not None
        batch = Batch(velocity, old, reference, anchor, noise, noisy, t, rollout.tau, rollout.optimality)
        policy, kl, deviation = nft_loss(batch, self.train.beta, self.train.space)
        return summed(policy, kl / share, self.train.beta_kl, rollout.weight, deviation)
