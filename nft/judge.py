"""What an epoch's rewards say: their statistics over all processes, and each sample's optimality."""

from itertools import starmap
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from nft.advantage import advantages, collapsed_groups, optimality
from nft.rollout import Rollout
from stitchvm_reward.rewards import not_finite

if TYPE_CHECKING:
    from nft.trainer import Trainer


def gathered(trainer: "Trainer", rollouts: list[Rollout]) -> dict[str, Tensor]:
    """Each reward of all processes' rollouts and `total`, (samples,) float32; 0 for a sample that is not among them."""
    return {
        name: trainer.agreement.gather(
            [(r.samples, r.rewards[name]) for r in rollouts], trainer.geometry.samples
        ).float()
        for name in [*trainer.scorer.rewards, "total"]
    }


def bad_reward(rewards: dict[str, Tensor]) -> str | None:
    """What to say of the first reward of which some scores are not finite, or None."""
    return next(filter(None, starmap(not_finite, rewards.items())), None)


def judge(trainer: "Trainer", rollouts: list[Rollout]) -> dict[str, float]:
    """The statistics of an epoch's rewards over all processes; `train/skipped` where some are not finite.

    Where rewards are compared, they become the rollouts' optimality r, or the step is skipped here; where they are
    back-propagated, that has been done.
    """
    geometry, metrics, rewards = trainer.geometry, {}, gathered(trainer, rollouts)
    for name, values in rewards.items():
        metrics[f"reward/{name}"] = float(values.mean())
        metrics[f"reward/{name}_std"] = float(values.std(correction=0))
        if values.min() == values.max() and trainer.main:
            told = f"reward {name} is the same for all {geometry.samples} samples of this epoch: it teaches nothing"
            tqdm.write(f"warning: {told}")
    bad = bad_reward(rewards)
    if bad is not None:
        if not trainer.draft:
            trainer.skip(f"{bad} in epoch {trainer.epoch + 1}")
        return metrics | {"train/skipped": float(trainer.skipped)}
    if trainer.draft:
        return metrics
    parts = [(r.samples, torch.tensor(r.prompts)) for r in rollouts]
    groups = trainer.agreement.gather(parts, geometry.samples)
    tau = trainer.agreement.gather([(r.samples, r.tau) for r in rollouts], geometry.samples)
    r = optimality(advantages(rewards["total"], groups, tau, trainer.recipe.train.per_group_std))
    for rollout in rollouts:
        rollout.optimality = r[rollout.samples]
    trainer.optimality_now = r
    metrics["train/collapsed_groups"] = collapsed_groups(rewards["total"], groups)
    metrics["train/optimality_std"] = float(r.std(correction=0))
    return metrics
