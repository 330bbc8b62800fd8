"""Negative-aware fine-tuning (DiffusionNFT, arXiv 2509.16117), on full and on stopped rollouts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nft.advantage import optimality
from nft.objectives.matching import Batch, Matching, MatchingSettings
from nft.objectives.objective import per_sample_mean
from stitchvm_reward.diffusion.path import anchor_coefficients, bridge_velocity, per_sample
from stitchvm_reward.runs.recipe import one_of, require

SPACES = ("anchor", "velocity")
SCALE = 5.0  # the advantage clip, so that at v = v_old the gradient is (2 r - 1) = A / 5 times SCALE: A itself


@dataclass
class NFTSettings(MatchingSettings):
    space: str = "anchor"
    """Loss on anchors with self-normalised weights (anchor) or on velocities (velocity)."""
    beta: float = 1.0
    """Strength of the implicit policies v+ and v-."""

    def check(self) -> None:
        super().check()
        one_of("train.space", self.space, SPACES)
        require(0 < self.beta <= 1, "train.beta must be in (0, 1]", self.beta)


def _branch(difference: Tensor, weighted: bool) -> Tensor:
    """Return the mean squared error per sample, where `weighted` divided by its own detached mean absolute error."""
    if not weighted:
        return per_sample_mean(difference.square())
    scale = per_sample_mean(difference.detach().abs()).clamp_min(1e-5)
    return per_sample_mean(difference.square()) / scale


def nft_loss(batch: Batch, beta: float, space: str = "anchor") -> tuple[Tensor, Tensor, Tensor]:
    """Return the policy term, the KL term (unweighted) and the deviation from the old policy, each (batch,) float32.

    The batch's `worth` is the optimality r in [0, 1]. The positive and negative branches lie around the old policy
    (DiffusionNFT, arXiv 2509.16117, eq. 5): v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v. In
    anchor space each of them predicts the anchor, X = A z_t - B v, and is compared with it under a self-normalised
    weight; at tau = 0 this is DiffusionNFT's loss on denoised latents. In velocity space it is the unweighted form of
    Stitched Value Model, C.4, eq. 77.
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
    r = batch.worth.to(v.device, torch.float32)
    policy = SCALE * (r * _branch(gains, weighted) + (1 - r) * _branch(losses, weighted)) / beta
    reference = batch.reference
    kl = torch.zeros_like(policy)
    if reference is not None:
        kl = per_sample_mean((v - reference.detach().float()).square())
    return policy, kl, per_sample_mean((v.detach() - v_old).square())


class NFT(Matching):
    """Scored rollouts become optimality, and optimality weighs the two branches of the loss."""

    settings = NFTSettings
    method = "reinforcement with the negative-aware objective of [DiffusionNFT](https://arxiv.org/abs/2509.16117)"
    worth_name = "optimality"

    @staticmethod
    def loss_text(train: Any) -> str:
        return f"{train.space} space, beta {train.beta:g}"

    @staticmethod
    def compare(batch: Batch, train: Any) -> list[tuple[float, Tensor]]:
        policy, kl, deviation = nft_loss(batch, train.beta, train.space)
        return [(1.0, policy), (train.beta_kl, kl), (0.0, deviation)]

    def worth(self, advantage: Tensor) -> Tensor:
        return optimality(advantage)
