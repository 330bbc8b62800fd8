"""From rewards to optimality probabilities, by groups of samples that share a prompt."""

from torch import Tensor

CLIP = 5.0


def advantages(rewards: Tensor, groups: Tensor, levels: Tensor, per_group_std: bool = False) -> Tensor:
    """Return group-normalised advantages (DiffusionNFT, arXiv 2509.16117, section 3).

    A = (R - mean over the group) / (std + 1e-4); the standard deviation is the population's, over all samples of
    the epoch or of the group. Samples stopped at different levels are never compared: mean and standard
    deviation are taken among samples of one level. `rewards`, `groups` (prompt indices) and `levels` (tau) are
    (samples,); returns (samples,) float32.
    """
    rewards = rewards.float()
    result = rewards.clone()
    for level in levels.unique():
        same_level = levels == level
        spread = rewards[same_level].std(correction=0)
        for group in groups[same_level].unique():
            members = same_level & (groups == group)
            within = rewards[members]
            if within.min() == within.max():
                # The mean of equal numbers is off by rounding, and an adaptive optimizer would amplify that to a step.
                result[members] = 0
                continue
            std = within.std(correction=0) if per_group_std else spread
            result[members] = (within - within.mean()) / (std + 1e-4)
    return result


def optimality(advantage: Tensor) -> Tensor:
    """Return the probability r = 0.5 + A / 10 in [0, 1], with A clipped to +-5 (DiffusionNFT, section 3.3)."""
    return 0.5 + advantage.clamp(-CLIP, CLIP) / (2 * CLIP)


def collapsed_groups(rewards: Tensor, groups: Tensor) -> float:
    """Return the share of groups whose rewards do not differ: they teach nothing."""
    distinct = groups.unique()
    flat = [bool(rewards[groups == group].min() == rewards[groups == group].max()) for group in distinct]
    return sum(flat) / len(flat)
