"""Direct reward fine-tuning: the reward is back-propagated through the solver's last steps.

DRaFT-K (arXiv 2309.17400) on pictures; on stopped rollouts the value of the noisy latents takes the reward's place
(Stitched Value Model, arXiv 2605.19804, C.3).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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
from nft.rollout import Rollout, RolloutRecipe, last_steps, rollout_stops
from nft.statistics import gather_rewards, nonfinite_reward, report_rewards
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.recipe import at_least, require
from stitchvm_reward.transfer import RunningMean, to_device


@dataclass
class DraftSettings(ObjectiveSettings):
    draft_steps: int = 1
    """The rollout's last solver steps, which draft back-propagates through: K of DRaFT-K."""

    def check(self) -> None:
        super().check()
        at_least("train.draft_steps", self.draft_steps, 1)


def draft_loss(reward: Tensor, velocities: Tensor, references: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the policy term, -reward, and the KL term (unweighted), each (batch,) float32.

    `reward` (batch,) in its own units and `velocities` (K, batch, ...) of the last K steps carry gradient;
    `references` (K, batch, ...) or None are the base model's velocities at the same latents, constants. The KL term is
    the mean of (v - v_ref)^2 over the steps too, which C.3 weighs with 0.01.
    """
    policy = -reward.float()
    if references is None:
        return policy, torch.zeros_like(policy)
    return policy, per_sample_mean((velocities.float() - references.detach().float()).square().transpose(0, 1))


class Draft(Objective):
    """Rollouts stop `draft_steps` early; the update takes these steps with gradient, scores the end and descends."""

    settings = DraftSettings
    method = "direct reward fine-tuning ([DRaFT](https://arxiv.org/abs/2309.17400))"
    terms: tuple[str, ...] = ("policy_loss", "kl")
    scores_rollouts = False
    syncs_per_update = 1  # whether the rewards are finite

    def __init__(self, parts: Parts):
        super().__init__(parts)
        self.train: Any = parts.train
        self.remaining_steps = self.train.draft_steps
        # Rollouts of the epoch as their last steps leave them, by their first sample.
        self.finished: dict[int, Rollout] = {}
        self.step_rollouts: list[Rollout] = []
        self.reward = RunningMean()

    @staticmethod
    def check(train: Any, rollout: RolloutRecipe) -> None:
        require(rollout.solver == "euler", "train.objective=draft needs rollout.solver=euler", rollout.solver)
        require(
            train.old_schedule == 0,
            "train.objective=draft needs train.old_schedule=0: it continues the current policy's own rollouts",
            train.old_schedule,
        )
        most = rollout.stop_window[0] if rollout.stop_window else rollout.steps
        require(
            train.draft_steps <= most,
            f"train.draft_steps must be at most the {most} solver steps that every rollout has",
            train.draft_steps,
        )

    @staticmethod
    def cost(train: Any) -> SampleCost:
        return SampleCost(train.draft_steps, 1 if train.beta_kl > 0 else 0, train.draft_steps, reward_gradient=True)

    @staticmethod
    def describe(train: Any, rollout: RolloutRecipe, rounds: int) -> tuple[str, str]:
        last = f"the last {train.draft_steps} solver steps" if train.draft_steps > 1 else "the last solver step"
        return (
            f"the reward back-propagated through {last}, beta_kl {train.beta_kl:g}",
            f"{rounds} forward and backward passes through {last} and the reward",
        )

    @staticmethod
    def training_pass(shapes: Shapes, batch: int) -> None:
        recipe, latents, generator = shapes.recipe, shapes.latents(batch), shapes.generator
        train, conditions = recipe.train, shapes.conditions(batch)
        levels = torch.zeros(train.draft_steps + 1, batch, dtype=torch.float64, device=latents.device)
        checkpointed = train.gradient_checkpointing
        end, states, velocities = last_steps(
            generator, generator.transformer, conditions, latents, levels=levels, checkpointed=checkpointed
        )
        references = None
        if train.beta_kl > 0:
            with torch.no_grad():
                references = torch.stack([shapes.velocity(z, conditions, None) for z in states.detach()])
        stopped = bool(recipe.rollout.stop_window)
        reward = shapes.value(end) if stopped else shapes.score(generator.decode(end))
        policy, kl = draft_loss(reward, velocities, references)
        (policy + train.beta_kl * kl).sum().backward()

    def learn(self, rollouts: list[Rollout], epoch: int) -> Learned:
        self.finished, self.reward = {}, RunningMean()
        metrics = self.learner.update(rollouts, epoch, self)
        finished = [self.finished[rollout.samples[0]] for rollout in rollouts]
        samples = self.learner.geometry.samples
        rewards = gather_rewards(self.ranks, finished, self.parts.reward_names, samples)
        metrics |= report_rewards(rewards, self.ranks)
        if nonfinite_reward(rewards) is not None:
            metrics["train/skipped"] = float(self.learner.skipped)
            return Learned(finished, metrics, finite=False)
        return Learned(finished, metrics)

    def losses(self, rollout: Rollout, epoch: int) -> list[LossCall]:
        return [lambda: self.loss(rollout, epoch)]

    def loss(self, rollout: Rollout, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the summed loss of where the last solver steps lead, and the sums of its terms.

        Raises InputError for a reward that cannot be back-propagated, on all processes before the backward pass.
        """
        with self.ranks.together():
            finished, policy, kl = self._finish(rollout, epoch)
        if rollout.weight:
            self.finished[rollout.samples[0]] = finished
            self.step_rollouts.append(finished)
        return summed([(1.0, policy), (self.train.beta_kl, kl)], rollout.weight)

    def _finish(self, rollout: Rollout, epoch: int) -> tuple[Rollout, Tensor, Tensor]:
        """Return the rollout at its end, without gradient, and the two terms of its loss."""
        device, conditions, learner = rollout.anchor.device, rollout.conditions, self.learner
        stops = torch.tensor(rollout_stops(self.parts.rollout, self.parts.seed, epoch, rollout.samples))
        sigmas = torch.tensor(self.sigmas, dtype=torch.float64)
        levels = torch.stack([sigmas[stops - left] for left in range(self.remaining_steps, -1, -1)])
        down = to_device(levels, device)
        # ZeRO-3 may not run a whole pass again in a backward pass: there the blocks' own checkpoints must do.
        checkpointed = self.train.gradient_checkpointing and learner.backend.stage < 3
        end, states, velocities = last_steps(
            self.generator, learner.network, conditions, rollout.anchor, levels=down, checkpointed=checkpointed
        )
        references = None
        if self.train.beta_kl > 0:
            given = zip(states.detach(), down)
            references = torch.stack([learner.frozen_velocity(None, z, t, conditions) for z, t in given])
        finished = replace(rollout, anchor=end, tau=down[-1].float(), taus=levels[-1].float().tolist())
        rewards = self._rewards(finished)
        # A reward that is not finite spoils the gradients, which `problem` then discards with the whole step.
        policy, kl = draft_loss(rewards["total"], velocities, references)
        detached = {name: scores.detach() for name, scores in rewards.items()}
        return replace(finished, anchor=end.detach(), rewards=detached), policy, kl

    def _rewards(self, rollout: Rollout) -> dict[str, Tensor]:
        if not rollout.weight:
            return {"total": rollout.anchor.flatten(1).mean(1)}  # a stand-in's reward, which counts nothing
        rewards = self.parts.score(rollout)
        for name, scores in rewards.items():
            if not scores.requires_grad:
                raise InputError(f"reward {name} has no gradient with respect to the image: use train.objective=nft")
        return rewards

    def progress(self, rollout: Rollout) -> dict[str, str]:
        if rollout.weight:
            self.reward.add(self.finished[rollout.samples[0]].rewards["total"])
        return self.reward.shown()

    def problem(self) -> str | None:
        rollouts, self.step_rollouts = self.step_rollouts, []
        scores = [scores for rollout in rollouts for scores in rollout.rewards.values()]
        bad = bool(scores) and not bool(torch.cat(scores).isfinite().all())
        if not self.ranks.sync(count=int(bad)):
            return None
        samples = self.learner.geometry.samples
        return nonfinite_reward(gather_rewards(self.ranks, rollouts, self.parts.reward_names, samples))
