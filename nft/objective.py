"""Negative-aware and direct reward fine-tuning: the losses. All algebra is in float32; every function is pure."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stitchvm_reward.diffusion.path import anchor_coefficients, bridge_velocity, per_sample

OBJECTIVES = ("nft", "draft")
SPACES = ("anchor", "velocity")
SCALE = 5.0  # the advantage clip, so that at v = v_old the gradient is (2 r - 1) = A / 5 times SCALE: A itself


@dataclass(frozen=True)
class Loss:
    """Per-sample terms, each (batch,) float32: `policy` and `kl` (unweighted) carry gradient."""

    policy: Tensor
    kl: Tensor
    deviation: Tensor


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def _branch(difference: Tensor, weighted: bool) -> Tensor:
    """Mean squared error per sample, divided by its own detached mean absolute error where `weighted`."""
    if not weighted:
        return _mean(difference.square())
    scale = _mean(difference.detach().abs()).clamp_min(1e-5)
    return _mean(difference.square()) / scale


def nft_loss(
    velocity: Tensor,
    old: Tensor,
    reference: Tensor | None,
    anchor: Tensor,
    noise: Tensor,
    noisy: Tensor,
    t: Tensor,
    tau: Tensor,
    optimality: Tensor,
    beta: float,
    space: str = "anchor",
) -> Loss:
    """Positive and negative branches around the old policy (DiffusionNFT, arXiv 2509.16117, eq. 5).

    `velocity` (with gradient), `old`, `reference` (or None), `anchor`, `noise` and `noisy` are (batch, ...), the
    levels `t` > `tau` and the `optimality` r in [0, 1] are (batch,).

    v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v. In anchor space, each predicts the anchor,
    X = A z_t - B v, and is compared with it under a self-normalised weight; at tau = 0 this is DiffusionNFT's
    loss on denoised latents. In velocity space, the unweighted form of Stitched Value Model C.4 eq. 77.
    Policy term: 5 (r L+ + (1 - r) L-) / beta. Its value does not depend on r at v = v_old: never judge by it.
    """
    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
    v, v_old, a = velocity.float(), old.detach().float(), anchor.float()
    level, stopped = per_sample(t, v), per_sample(tau, v)
    positive, negative = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
    if space == "anchor":
        of_latent, of_velocity = anchor_coefficients(level, stopped)
        fixed = of_latent * noisy.float() - a
        gains, losses = fixed - of_velocity * positive, fixed - of_velocity * negative
    else:
        target = bridge_velocity(a, noise.float(), level, stopped)
        gains, losses = positive - target, negative - target
    weighted = space == "anchor"
    r = optimality.to(v.device, torch.float32)
    policy = SCALE * (r * _branch(gains, weighted) + (1 - r) * _branch(losses, weighted)) / beta
    kl = torch.zeros_like(policy) if reference is None else _mean((v - reference.detach().float()).square())
    return Loss(policy, kl, _mean((v.detach() - v_old).square()))


def draft_loss(reward: Tensor, velocities: Tensor, references: Tensor | None) -> Loss:
    """The reward itself, back-propagated through the solver's last K steps (DRaFT-K, arXiv 2309.17400; with a value
    model in the reward's place, Stitched Value Model, arXiv 2605.19804, C.3).

    `reward` (batch,) in its own units and `velocities` (K, batch, ...) of those steps carry gradient; `references`
    (K, batch, ...) or None are the base model's velocities at the same latents, constants.

    Policy term: -reward. kl: mean (v - v_ref)^2 over the steps too, which C.3 weighs with .01. The old policy is the
    current one: deviation is 0.
    """
    policy = -reward.float()
    kl = torch.zeros_like(policy)
    if references is not None:
        kl = _mean((velocities.float() - references.detach().float()).square().transpose(0, 1))
    return Loss(policy, kl, torch.zeros_like(policy.detach()))
