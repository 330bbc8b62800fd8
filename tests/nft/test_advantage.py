"""Rewards to advantages to optimality probabilities."""

import pytest
import torch

from nft.advantage import advantages, collapsed_groups, optimality

GROUPS = torch.tensor([0, 1, 0, 2, 1, 0])
REWARDS = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
OVERALL = torch.tensor([-1.36618, -0.878259, -0.195169, 0.0, 0.878259, 1.561349])
WITHIN = torch.tensor([-1.135495, -0.999933, -0.162214, 0.0, 0.999933, 1.297708])


@pytest.mark.parametrize("per_group_std, expected", [(False, OVERALL), (True, WITHIN)])
def test_advantages_have_the_known_values(per_group_std, expected):
    found = advantages(REWARDS, GROUPS, torch.zeros(6), per_group_std)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("per_group_std", [False, True])
def test_advantages_do_not_depend_on_the_order_of_samples(per_group_std):
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    expected = advantages(REWARDS, GROUPS, torch.zeros(6), per_group_std)[order]
    assert torch.equal(advantages(REWARDS[order], GROUPS[order], torch.zeros(6), per_group_std), expected)


@pytest.mark.parametrize("per_group_std", [False, True])
def test_samples_of_different_levels_are_never_compared(per_group_std):
    levels = torch.tensor([0.6, 0.75]).repeat_interleave(6)
    other = torch.tensor([107.0, 90.0, 95.0, 120.0, 91.0, 100.0])
    together = advantages(torch.cat([REWARDS, other]), GROUPS.repeat(2), levels, per_group_std)
    apart = [advantages(rewards, GROUPS, torch.zeros(6), per_group_std) for rewards in (REWARDS, other)]
    torch.testing.assert_close(together, torch.cat(apart))


def test_half_precision_rewards_are_normalised_in_float32():
    found = advantages(REWARDS.half(), GROUPS, torch.zeros(6))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, OVERALL, rtol=0, atol=1e-5)


def test_equal_rewards_give_advantage_zero():
    assert torch.equal(advantages(torch.full((6,), 3.0), GROUPS, torch.zeros(6)), torch.zeros(6))


def test_optimality_is_linear_and_clipped_to_probabilities():
    found = optimality(torch.tensor([-100.0, -5.0, -2.0, 0.0, 1.0, 5.0, 100.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.3, 0.5, 0.6, 1.0, 1.0]))


def test_collapsed_groups_counts_groups_of_equal_rewards():
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    rewards = torch.tensor([1.0, 1.0, 1.0, 2.0, 5.0, 5.0, 0.0, -1.0])
    assert collapsed_groups(rewards, groups) == 0.5
    assert collapsed_groups(torch.arange(8.0), groups) == 0
    assert collapsed_groups(torch.zeros(8), groups) == 1
