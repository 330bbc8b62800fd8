"""The stitching layer's start, and the closed-form search."""

import pytest
import torch

from stitchvm_reward.stitching.layer import StitchingLayer, resample
from stitchvm_reward.stitching.search import Moments, initial_weights, search, solve

CPU = torch.device("cpu")


def test_the_layer_starts_as_the_closed_form_solution():
    layer, solution = StitchingLayer(6, 16, side=4), torch.randn(7, 16, dtype=torch.float64)
    layer.set_linear(solution)
    features = torch.randn(2, 6, 8, 8)
    expected = (resample(features, 4).flatten(2).transpose(1, 2).double() @ solution[:-1] + solution[-1]).float()
    torch.testing.assert_close(layer(features).flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
    assert layer.residual[1].out_channels == 2  # a bottleneck of an eighth


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _features() -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Block 1 explains the first target exactly, block 2 nearly, block 0 not at all."""
    random = torch.Generator().manual_seed(0)
    known = torch.randn(40, 9, 8, generator=random)
    target = known @ torch.randn(8, 5, generator=random) + 2
    blurred = known + 0.5 * torch.randn(known.shape, generator=random)
    other = torch.randn(40, 9, 7, generator=random)
    shifted = target + torch.randn(9, 5, generator=random)
    return {0: other, 1: known, 2: blurred}, {1: target, 2: shifted}, {2: target.mean(1)}


def moments(images: slice = slice(None), parts=None, size: int = 7) -> Moments:
    """Return the sums over some images, gathered in batches."""
    backbone, reward, classes = parts or _features()
    patches = next(iter(reward.values())).shape[1]
    found = Moments({i: x.shape[-1] for i, x in backbone.items()}, dict.fromkeys(reward, 5), patches, CPU)
    rows = list(range(len(backbone[1])))[images]
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        found.add(*({key: tensor[batch] for key, tensor in part.items()} for part in (backbone, reward, classes)))
    return found


def _design(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([features.double(), torch.ones(*features.shape[:-1], 1, dtype=torch.float64)], dim=-1)


def _fit(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.linalg.lstsq(_design(features).flatten(0, 1), target.double().flatten(0, 1)).solution


def test_normal_equations_agree_with_lstsq_to_a_part_in_a_hundred_million():
    # Features of very different scales and with a large common offset, as a transformer's are, and correlated.
    scales = torch.logspace(-2, 3, 24)
    features = (_random(300, 9, 24) + 3 * _random(300, 9, 1, seed=1) + 5) * scales
    target = features @ _random(24, 5, seed=2) + 100 * _random(300, 9, 5, seed=3)
    weights = initial_weights(moments(parts=({1: features}, {1: target}, {})), 1, 1)[0]
    expected = _fit(features, target)
    assert float(((weights - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-8
    found = search(*(moments(part, ({1: features}, {1: target}, {})) for part in (slice(200), slice(200, None))))
    residual = _design(features[200:]) @ _fit(features[:200], target[:200]) - target[200:].double()
    assert float(found.held_out[0, 0]) == pytest.approx(float(residual.square().mean()), rel=1e-9)
    assert found.used == found.widths == [24] and found.dependent() == []


def test_dependent_features_are_solved_by_their_own_directions_and_reported():
    free = _random(60, 9, 6)
    features = torch.cat([free, free[..., :2] - free[..., 2:4], torch.zeros(60, 9, 1)], dim=-1).double()
    features[..., 6:8] = features[..., :2] - features[..., 2:4]  # exactly, without rounding to float32
    target = free @ _random(6, 5, seed=1) + 0.1 * _random(60, 9, 5, seed=2)
    parts = [moments(part, ({1: features}, {1: target}, {})) for part in (slice(50), slice(50, None))]
    found = search(*parts)
    expected = _design(free[50:]) @ _fit(free[:50], target[:50]) - target[50:].double()
    assert float(found.held_out[0, 0]) == pytest.approx(float(expected.square().mean()), rel=1e-6)
    assert found.used == [6]
    assert found.dependent() == ["block 1: features are nearly dependent, 6 of 9 directions are used"]
    assert found.table()[0]["used"] == 6 and found.table()[0]["width"] == 9


def test_solutions_of_dependent_features_are_finite_and_exact_where_the_target_is():
    free = _random(50, 3).double()
    features = torch.cat([free, free.sum(1, keepdim=True)], dim=1)
    target = free @ _random(3, 2, seed=1).double()
    solution = solve(features.T @ features, features.T @ target)
    assert solution.rank == 3
    torch.testing.assert_close(features @ solution.weights, target, rtol=1e-7, atol=1e-7)


def test_the_search_prefers_the_block_that_explains_the_target():
    found = search(moments(slice(30)), moments(slice(30, None)))
    assert found.best() == (1, 1)
    assert found.best(blocks=[2]) == (2, 1) and found.best(reward_blocks=[2]) == (1, 2)
    assert float(found.fit[1, 0]) < 1e-10 and float(found.held_out[1, 0]) < 1e-10
    assert float(found.held_out[0, 0]) > float(found.held_out[2, 0]) > 0.01
    assert {row["unexplained"] < 1.2 for row in found.table()} == {True}


def test_blocks_solved_apart_make_the_same_search():
    parts = moments(slice(30)), moments(slice(30, None))
    whole, shares = search(*parts), []
    for mine in ([0, 1], [2]):
        found = search(*parts, mine=mine)
        shares.append(torch.stack([found.fit, found.held_out]))
    assert torch.equal(shares[0] + shares[1], torch.stack([whole.fit, whole.held_out]))


def test_sums_over_shares_of_the_images_are_those_over_all():
    whole, shares = moments(), moments(slice(0, 40, 2)).plus(moments(slice(1, 40, 2)))
    for first, second in zip(whole.tensors(), shares.tensors(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_a_cut_beyond_the_first_block_starts_with_each_positions_mean_residual():
    solution, class_state, offsets = initial_weights(moments(), 1, 2)
    assert solution.shape == (9, 5) and class_state.shape == (5,) and offsets.shape == (9, 5)
    backbone, reward, classes = _features()
    rebuilt = backbone[1].double() @ solution[:-1] + solution[-1] + offsets
    torch.testing.assert_close(rebuilt, reward[2].double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(class_state, classes[2].double().mean(0), rtol=1e-6, atol=1e-6)
    assert initial_weights(moments(), 1, 1)[1:] == (None, None)
