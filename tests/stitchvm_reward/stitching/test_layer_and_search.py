"""The stitching layer's start, and the closed-form search."""

import torch

from stitchvm_reward.stitching.layer import StitchingLayer, resample
from stitchvm_reward.stitching.search import Probe, initial_weights, search, solve


def test_the_layer_starts_as_the_closed_form_solution():
    layer, solution = StitchingLayer(6, 16, side=4), torch.randn(7, 16, dtype=torch.float64)
    layer.set_linear(solution)
    features = torch.randn(2, 6, 8, 8)
    expected = (resample(features, 4).flatten(2).transpose(1, 2).double() @ solution[:-1] + solution[-1]).float()
    torch.testing.assert_close(layer(features).flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
    assert layer.residual[1].out_channels == 2  # a bottleneck of an eighth


def test_least_squares_finds_a_linear_relation():
    features, truth = torch.randn(400, 5), torch.randn(6, 3, dtype=torch.float64)
    targets = features.double() @ truth[:-1] + truth[-1]
    torch.testing.assert_close(solve(features, targets), truth, rtol=1e-6, atol=1e-6)


def _probe() -> Probe:
    random = torch.Generator().manual_seed(0)
    known = torch.randn(40, 9, 8, generator=random)
    target = known @ torch.randn(8, 5, generator=random) + 2
    blurred = known + 0.5 * torch.randn(known.shape, generator=random)
    other = torch.randn(40, 9, 7, generator=random)
    states = {2: target.mean(1)}
    return Probe({0: other, 1: known, 2: blurred}, {1: target, 2: target + torch.randn(9, 5, generator=random)}, states)


def test_the_search_prefers_the_block_that_explains_the_target():
    found = search(_probe(), fitted=30)
    assert found.best() == (1, 1)
    assert found.best(blocks=[2]) == (2, 1) and found.best(reward_blocks=[2]) == (1, 2)
    assert float(found.fit[1, 0]) < 1e-10 and float(found.held_out[1, 0]) < 1e-10
    assert float(found.held_out[0, 0]) > float(found.held_out[2, 0]) > 0.01
    assert {row["unexplained"] < 1.2 for row in found.table()} == {True}


def test_a_cut_beyond_the_first_block_starts_with_each_positions_mean_residual():
    solution, class_state, offsets = initial_weights(_probe(), 1, 2)
    assert solution.shape == (9, 5) and class_state.shape == (5,) and offsets.shape == (9, 5)
    rebuilt = _probe().backbone[1].double() @ solution[:-1] + solution[-1] + offsets
    torch.testing.assert_close(rebuilt, _probe().reward[2].double(), rtol=1e-4, atol=1e-4)
    assert initial_weights(_probe(), 1, 1)[1:] == (None, None)
