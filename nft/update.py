"""One micro batch's share of an optimizer step."""

import torch
from torch import Tensor, nn

from nft.config import Recipe
from nft.objective import nft_loss
from nft.policy import Policy
from nft.rollout import Rollout, training_levels
from stitchvm_reward.diffusion.generator import Conditions, Generator
from stitchvm_reward.diffusion.path import bridge, per_sample
from stitchvm_reward.runs import randomness


def chosen_levels(recipe: Recipe, rollout: Rollout, sigmas: list[float], epoch: int) -> Tensor:
    """The noise levels that each sample is trained on, (batch, levels_per_sample)."""
    train, tau = recipe.train, rollout.tau.tolist()
    count, kind = train.levels_per_sample, train.levels
    return training_levels(rollout.samples, tau, sigmas, count, kind, recipe.seed, epoch).to(rollout.anchor.device)


def rollout_loss(
    recipe: Recipe,
    generator: Generator,
    network: nn.Module,
    policy: Policy,
    rollout: Rollout,
    t: Tensor,
    epoch: int,
    level: int,
) -> tuple[Tensor, Tensor]:
    """Summed loss at levels t (batch,) above each sample's tau, and the sums of its terms without gradient.

    The terms are policy, kl and deviation, (3,). `level` addresses the noise. The old forward is skipped while old
    equals current, the reference forward where beta_kl is 0.
    """
    train, anchor, conditions = recipe.train, rollout.anchor, rollout.conditions
    noise = randomness.noise(
        generator.latent_shape, recipe.seed, randomness.TRAINING, epoch, rollout.samples, level
    ).to(anchor.device)
    kept, added = bridge(per_sample(t, anchor), per_sample(rollout.tau, anchor))
    noisy = kept * anchor + added * noise

    def frozen(adapter: str | None) -> Tensor:
        return _frozen_velocity(generator, network, policy, adapter, noisy, t, conditions)

    velocity = generator.velocity(noisy, t, conditions, network)
    old = velocity.detach() if policy.old_is_current else frozen("old")
    reference = frozen(None) if train.beta_kl > 0 else None
    assert rollout.optimality is not None
    terms = nft_loss(
        velocity, old, reference, anchor, noise, noisy, t, rollout.tau, rollout.optimality, train.beta, train.space
    )
    loss = (terms.policy + train.beta_kl * terms.kl).sum() * rollout.weight
    parts = torch.stack([terms.policy.detach().sum(), terms.kl.detach().sum(), terms.deviation.sum()])
    return loss, parts * rollout.weight


@torch.no_grad()
def _frozen_velocity(
    generator: Generator,
    network: nn.Module,
    policy: Policy,
    adapter: str | None,
    noisy: Tensor,
    t: Tensor,
    conditions: Conditions,
) -> Tensor:
    with policy.using(adapter):
        return generator.velocity(noisy, t, conditions, network)
