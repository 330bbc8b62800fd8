"""One optimizer step over all processes, and a micro batch's share of it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nft.config import Recipe
from nft.objective import nft_loss
from nft.policy import Policy
from nft.rollout import Rollout, training_levels
from stitchvm_reward.diffusion.generator import Conditions, Generator
from stitchvm_reward.diffusion.path import bridge, per_sample
from stitchvm_reward.runs import randomness

if TYPE_CHECKING:
    from nft.trainer import Trainer


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


def optimizer_step(trainer: "Trainer", epoch: int, update: int, batches: list[Rollout]) -> Tensor:
    """One step over all processes: mean over its samples and levels, gradients reduced once."""
    levels, rounds = trainer.recipe.train.levels_per_sample, trainer.geometry.rounds(update)
    terms = trainer.geometry.samples_in(update) * levels
    sums = torch.zeros(4, device=trainer.accelerator.device)
    with trainer.backend.accumulating():
        for index in range(rounds):
            trainer.agreement.settle()
            rollout = batches[index] if index < len(batches) else _empty(trainer)
            chosen = chosen_levels(trainer.recipe, rollout, trainer.sigmas, epoch)
            for level in range(levels):
                with trainer.backend.passing(last=index == rounds - 1 and level == levels - 1):
                    loss, parts = rollout_loss(
                        trainer.recipe,
                        trainer.generator,
                        trainer.network,
                        trainer.policy,
                        rollout,
                        chosen[:, level],
                        epoch,
                        level,
                    )
                    # Gradients are averaged over processes; the sum over all samples is wanted.
                    trainer.backend.backward(loss * trainer.accelerator.num_processes / terms)
                sums[:3] += parts
    norm = trainer.backend.step()
    if norm is None:
        trainer.skip(
            f"the gradient is not finite in epoch {epoch + 1}, update {update + 1} (a high train.learning_rate?)"
        )
        return torch.zeros_like(sums)
    trainer.skipped = 0
    trainer.scheduler.step()
    trainer.step += 1
    trainer.policy.after_update(trainer.step, trainer.recipe.train.ema_decay)
    reduced = trainer.accelerator.reduce(sums, "sum") / terms
    reduced[3] = norm
    return reduced


def _empty(trainer: "Trainer") -> Rollout:
    """A stand-in of weight zero, so that every process runs the network equally often."""
    device = trainer.accelerator.device
    table, row = trainer.embeddings.conditions([trainer.prompts[0]]), torch.zeros(1, dtype=torch.long, device=device)
    anchor = torch.zeros(1, *trainer.generator.latent_shape, device=device)
    zero = torch.zeros(1, device=device)
    return Rollout([0], [0], table, row, anchor, zero, optimality=zero, weight=0.0)
