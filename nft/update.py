"""One optimizer step over all processes, and a micro batch's share of it."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nft.config import Recipe
from nft.judge import bad_reward, gathered
from nft.objective import Loss, draft_loss, nft_loss
from nft.policy import Policy
from nft.rollout import Rollout, last_steps, training_levels
from stitchvm_reward.diffusion.generator import Conditions, Generator
from stitchvm_reward.diffusion.path import bridge, per_sample
from stitchvm_reward.errors import InputError
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
    return _summed(terms, train.beta_kl, rollout.weight)


def _summed(terms: Loss, beta_kl: float, weight: float) -> tuple[Tensor, Tensor]:
    loss = (terms.policy + beta_kl * terms.kl).sum() * weight
    parts = torch.stack([terms.policy.detach().sum(), terms.kl.detach().sum(), terms.deviation.sum()])
    return loss, parts * weight


def draft_rollout_loss(trainer: "Trainer", rollout: Rollout, epoch: int) -> tuple[Tensor, Tensor]:
    """As `rollout_loss`, of the reward of where the last train.draft_steps solver steps lead.

    The rollout has been left that many steps early; its latents, level and rewards become those at its end, without
    gradient. Raises InputError for a reward that cannot be back-propagated.
    """
    train, device, conditions = trainer.recipe.train, rollout.anchor.device, rollout.conditions
    stops = torch.tensor(trainer.stops(epoch, rollout.samples))
    levels = [
        torch.tensor(trainer.sigmas, dtype=torch.float64)[stops - left] for left in range(train.draft_steps, -1, -1)
    ]
    down = torch.stack(levels).to(device)
    # ZeRO-3 may not be run again as a whole in a backward pass: there the blocks' own checkpoints must do.
    network, checkpointed = trainer.network, train.gradient_checkpointing and trainer.backend.stage < 3
    end, states, velocities = last_steps(trainer.generator, network, conditions, rollout.anchor, down, checkpointed)
    references = None
    if train.beta_kl > 0:
        given = zip(states.detach(), down)
        references = torch.stack(
            [_frozen_velocity(trainer.generator, network, trainer.policy, None, z, t, conditions) for z, t in given]
        )
    rollout.anchor, rollout.tau = end, down[-1].float()
    if rollout.weight:
        rewards = trainer.score(rollout)
        for name, scores in rewards.items():
            if not scores.requires_grad:
                raise InputError(f"reward {name} has no gradient with respect to the image: take train.objective=nft")
    else:
        rewards = {"total": end.flatten(1).mean(1)}  # a stand-in's, which counts nothing
    loss, parts = _summed(draft_loss(rewards["total"], velocities, references), train.beta_kl, rollout.weight)
    if not rewards["total"].isfinite().all():
        loss = loss + velocities.sum() * torch.nan  # a gradient may not show it, and then the step would be taken
    rollout.anchor, rollout.rewards = end.detach(), {name: scores.detach() for name, scores in rewards.items()}
    return loss, parts


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


def _losses(trainer: "Trainer", rollout: Rollout, epoch: int) -> list[Callable[[], tuple[Tensor, Tensor]]]:
    """What computes each of a micro batch's losses; the processes meet in the first."""
    if trainer.draft:
        # A reward that fails does so on this process alone: the others must hear of it before the backward pass.
        return [lambda: trainer.agreement.together(lambda: draft_rollout_loss(trainer, rollout, epoch))]
    trainer.agreement.settle()
    given = (trainer.recipe, trainer.generator, trainer.network, trainer.policy, rollout)
    chosen = chosen_levels(trainer.recipe, rollout, trainer.sigmas, epoch)
    return [partial(rollout_loss, *given, chosen[:, level], epoch, level) for level in range(chosen.shape[1])]


def optimizer_step(trainer: "Trainer", epoch: int, update: int, batches: list[Rollout], bar: tqdm) -> Tensor:
    """One step over all processes: mean over its samples and levels, gradients reduced once.

    `bar` counts micro batches. Returns the loss's mean terms, as `rollout_loss` has them, and the gradient's norm.
    """
    rounds, draft = trainer.geometry.rounds(update), trainer.draft
    terms = trainer.geometry.samples_in(update) * trainer.recipe.train.levels_per_sample
    sums = torch.zeros(4, device=trainer.accelerator.device)
    with trainer.backend.accumulating():
        for index in range(rounds):
            rollout = batches[index] if index < len(batches) else _empty(trainer)
            losses = _losses(trainer, rollout, epoch)
            for place, compute in enumerate(losses):
                with trainer.backend.passing(last=index == rounds - 1 and place == len(losses) - 1):
                    loss, parts = compute()
                    # Gradients are averaged over processes; the sum over all samples is wanted.
                    trainer.backend.backward(loss * trainer.accelerator.num_processes / terms)
                sums[:3] += parts
            bar.update()
            if draft and batches:
                bar.set_postfix(reward=f"{-float(sums[0]) / sum(len(r.samples) for r in batches[: index + 1]):.3f}")
    norm = trainer.backend.step()
    if norm is None:
        told = bad_reward(gathered(trainer, batches)) if draft else None
        told = f"{told} in" if told else "the gradient is not finite in"
        trainer.skip(f"{told} epoch {epoch + 1}, update {update + 1} (a high train.learning_rate?)")
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
