"""Advantage-weighted matching (arXiv 2509.25050): flow matching on rollouts, pulled or pushed by their advantages."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nft.advantage import CLIP
from nft.objectives.compared import clipped_surrogate
from nft.objectives.matching import Batch, Matching, MatchingSettings, same_policy
from nft.objectives.objective import per_sample_mean
from nft.rollout import RolloutRecipe
from stitchvm_reward.diffusion.path import anchor_coefficients, bridge_velocity, per_sample
from stitchvm_reward.runs.recipe import at_least, positive, require

LEAST = 1e-10  # added to a squared error, whose power would otherwise have no gradient at 0


@dataclass
class AWMSettings(MatchingSettings):
    matching_power: float = 0.25
    """Power of the squared error in the matching loss, which is weighted with the noise level: 0.25 as in the official
    recipes (`ghuber` there), 0.5 is the root of the squared error, 1 the squared error itself (`t`)."""
    matching_clip: float = 1.0
    """Clip range of the likelihood ratio between the current and the old policy, PPO's epsilon."""
    beta_old: float = 1.0
    """Weight of the mean squared distance to the old policy's velocity; 0 where the old policy is always the current
    one (train.old_schedule=0, train.updates_per_epoch=1)."""

    def check(self) -> None:
        super().check()
        require(0 < self.matching_power <= 1, "train.matching_power must be in (0, 1]", self.matching_power)
        positive("train.matching_clip", self.matching_clip)
        at_least("train.beta_old", self.beta_old, 0)


def matching_loss(velocity: Tensor, batch: Batch, power: float) -> Tensor:
    """Return B (mean |u - target|^2)^power / power of a velocity u, (batch,) float32: minus a log-likelihood.

    The target is the conditional velocity, eps - z_0 on full rollouts. B is the coefficient of u in the estimate of the
    anchor, A z_t - B u: the level t on full rollouts, as in the official code. On stopped ones it takes the target's
    growing variance away as t comes near tau.
    """
    t, tau = per_sample(batch.t, velocity), per_sample(batch.tau, velocity)
    target = bridge_velocity(batch.anchor.float(), batch.noise.float(), t, tau)
    weight = anchor_coefficients(batch.t.float(), batch.tau.float())[1]
    return weight * (per_sample_mean((velocity.float() - target).square()) + LEAST) ** power / power


def awm_loss(batch: Batch, power: float, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the policy term, the KL term and the deviation from the old policy (unweighted), each (batch,) float32.

    The batch's `worth` is the advantage A in [-5, 5], which counts as A / 5 (arXiv 2509.25050, and its code). The
    matching loss stands in for minus the log-likelihood of a sample, so the likelihood ratio of the current and the old
    policy is exp(loss_old - loss), and the policy term PPO's max(-A ratio, -A clip(ratio)). At v = v_old its gradient
    is A / 5 times that of the matching loss. The KL term is the mean of (v - v_ref)^2, and the deviation that of
    (v - v_old)^2, which the code calls KL-EMA; both have gradient. All algebra is in float32.
    """
    velocity, old = batch.velocity.float(), batch.old.detach().float()
    ratio = (matching_loss(old, batch, power) - matching_loss(velocity, batch, power)).exp()
    policy = clipped_surrogate(ratio, batch.worth.to(ratio) / CLIP, clip)
    kl = policy.new_zeros(policy.shape)
    if batch.reference is not None:
        kl = per_sample_mean((velocity - batch.reference.detach().float()).square())
    return policy, kl, per_sample_mean((velocity - old).square())


class AWM(Matching):
    """Advantages weigh the likelihood ratio of the current and the old policy, measured by the matching loss.

    The official code samples with the current policy and keeps a lagging copy for the last term. Here the old policy is
    both; that is its option `off_policy`.
    """

    settings = AWMSettings
    method = "reinforcement by [advantage-weighted matching](https://arxiv.org/abs/2509.25050)"

    @staticmethod
    def check(train: Any, rollout: RolloutRecipe) -> None:
        Matching.check(train, rollout)
        require(
            train.beta_old == 0 or not same_policy(train),
            "train.beta_old must be 0 where the old policy is always the current one (train.old_schedule=0, "
            "train.updates_per_epoch=1)",
            train.beta_old,
        )

    @staticmethod
    def loss_text(train: Any) -> str:
        return f"matching power {train.matching_power:g}, clip {train.matching_clip:g}, beta_old {train.beta_old:g}"

    @staticmethod
    def compare(batch: Batch, train: Any) -> list[tuple[float, Tensor]]:
        policy, kl, deviation = awm_loss(batch, train.matching_power, train.matching_clip)
        return [(1.0, policy), (train.beta_kl, kl), (train.beta_old, deviation)]
