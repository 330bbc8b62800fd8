"""Objectives that compare the rewards of samples that share a prompt: rewards become advantages, then an update."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nft.advantage import CLIP, advantages, collapsed_groups
from nft.objectives.objective import Learned, Objective, ObjectiveSettings, Parts
from nft.rollout import Rollout, RolloutRecipe
from nft.statistics import gather_rewards, nonfinite_reward, report_rewards
from stitchvm_reward.runs.recipe import require
from stitchvm_reward.transfer import to_device


@dataclass
class ComparedSettings(ObjectiveSettings):
    per_group_std: bool = False
    """Divide advantages by the standard deviation of the group instead of the epoch."""
    old_schedule: int = 1
    """How the old policy follows the current one: 0 at once; 1 rises to 0.5; 2 is zero until step 75, then rises to
    0.999 (the share that the old policy keeps of itself per epoch, DiffusionNFT)."""

    def check(self) -> None:
        super().check()
        require(self.old_schedule in (0, 1, 2), "train.old_schedule must be 0, 1 or 2", self.old_schedule)


def check_groups(rollout: RolloutRecipe) -> None:
    """Raise InputError for groups of one sample."""
    require(
        rollout.group_size >= 2,
        "rollout.group_size must be at least 2: a lone sample has no advantage",
        rollout.group_size,
    )


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return PPO's max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)) (arXiv 1707.06347, eq. 7), (batch,)."""
    return -(advantage * ratio).minimum(advantage * ratio.clamp(1 - clip, 1 + clip))


class Compared(Objective):
    """Scored rollouts have advantages, and `worth` makes of them what the loss weighs samples by.

    `worth_name` is its name in metrics and histograms.
    """

    gathered = 2  # the prompt of each sample, and the level at which its rollout stopped
    worth_name = "advantage"

    def __init__(self, parts: Parts):
        super().__init__(parts)
        self.train: Any = parts.train

    def worth(self, advantage: Tensor) -> Tensor:
        """Return what the loss weighs samples by: here the advantages (samples,), clipped to +-5."""
        return advantage.clamp(-CLIP, CLIP)

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
        worth = self.worth(advantages(rewards["total"], groups, tau, self.train.per_group_std))
        metrics["train/collapsed_groups"] = collapsed_groups(rewards["total"], groups)
        metrics[f"train/{self.worth_name}_std"] = float(worth.std(correction=0))
        device = self.generator.device
        rollouts = [replace(rollout, worth=to_device(worth[rollout.samples], device)) for rollout in rollouts]
        metrics |= self.learner.update(rollouts, epoch, self)
        return Learned(rollouts, metrics, histograms={self.worth_name: worth})
