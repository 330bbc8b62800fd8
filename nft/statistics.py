"""Statistics of an epoch's rewards over all processes."""

from itertools import starmap

from torch import Tensor
from tqdm import tqdm

from nft.rollout import Rollout
from stitchvm_reward.rewards import not_finite
from stitchvm_reward.runs.rank_sync import RankSync


def gather_rewards(ranks: RankSync, rollouts: list[Rollout], names: list[str], samples: int) -> dict[str, Tensor]:
    """Return each reward of all processes' rollouts and `total`, (samples,) float32 on the CPU; 0 for a missing one."""
    return {
        name: ranks.gather([(r.samples, r.rewards[name]) for r in rollouts], samples).float().cpu()
        for name in [*names, "total"]
    }


def nonfinite_reward(rewards: dict[str, Tensor]) -> str | None:
    """Describe the first reward that has scores which are not finite; None where all are finite."""
    return next(filter(None, starmap(not_finite, rewards.items())), None)


def reward_statistics(rewards: dict[str, Tensor]) -> dict[str, float]:
    """Return mean and population standard deviation of each reward, given as (samples,)."""
    metrics = {}
    for name, values in rewards.items():
        metrics[f"reward/{name}"] = float(values.mean())
        metrics[f"reward/{name}_std"] = float(values.std(correction=0))
    return metrics


def report_rewards(rewards: dict[str, Tensor], ranks: RankSync) -> dict[str, float]:
    """Return `reward_statistics`, and warn on the main process of rewards that give all samples the same score."""
    for name, values in rewards.items():
        if values.min() == values.max() and ranks.accelerator.is_main_process:
            message = f"reward {name} is the same for all {len(values)} samples of this epoch: it teaches nothing"
            tqdm.write(f"warning: {message}")
    return reward_statistics(rewards)
