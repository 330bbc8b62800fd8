"""Intervals over seeds and prompts."""

import numpy as np
import pytest

from stitchvm_reward.bootstrap import Interval, mean_interval, over_prompts, over_seeds, percentiles
from stitchvm_reward.errors import InputError


def draw(generator, size, seed=0.0, prompt=0.0, noise=0.0):
    """Scores (seeds, prompts) of mean zero: effects of the seed, of the prompt, and of both together."""
    seeds, prompts = size
    effects = seed * generator.normal(size=(seeds, 1)) + prompt * generator.normal(size=(1, prompts))
    return effects + noise * generator.normal(size=size)


def coverage(size, times=250, **effects):
    """The share of intervals that contain the true mean, and their mean length over that of the exact one."""
    generator, (seeds, prompts) = np.random.default_rng(0), size
    found = [mean_interval(draw(generator, size, **effects)) for _ in range(times)]
    spread = {"seed": seeds, "prompt": prompts, "noise": seeds * prompts}
    exact = 2 * 1.96 * sum(effects[name] ** 2 / spread[name] for name in effects) ** 0.5
    covered = float(np.mean([interval.low <= 0 <= interval.high for interval in found]))
    return covered, float(np.mean([interval.high - interval.low for interval in found])) / exact


@pytest.mark.parametrize(
    ("size", "effects"),
    [
        ((5, 60), {"seed": 0.1, "prompt": 1.0, "noise": 1.0}),
        ((3, 60), {"seed": 0.05, "prompt": 1.0, "noise": 0.5}),
        ((1, 60), {"prompt": 1.0, "noise": 1.0}),
    ],
)
def test_an_interval_contains_the_true_mean_about_as_often_as_it_says(size, effects):
    covered, length = coverage(size, **effects)
    assert 0.91 <= covered <= 0.99 and 0.9 <= length <= 1.25


def test_seeds_alone_or_prompts_alone_would_say_too_little():
    scores = draw(np.random.default_rng(1), (5, 60), seed=0.3, prompt=1.0, noise=0.3)
    whole = mean_interval(scores)
    prompts = mean_interval(scores.mean(0)[None])
    seeds = percentiles(0.0, over_seeds(np.broadcast_to(scores.mean(1), (10_000, 5))))
    for part in (prompts, seeds):
        assert part.high - part.low < 0.95 * (whole.high - whole.low)


def test_the_limits_that_the_docstring_states():
    covered, length = coverage((3, 60), noise=1.0)
    assert covered > 0.97 and length == pytest.approx((3 - 2 / 3) ** 0.5, rel=0.06)
    covered, _ = coverage((3, 20), seed=1.0, noise=0.1)
    assert covered == pytest.approx(0.75, abs=0.08)
    covered, _ = coverage((5, 20), seed=1.0, noise=0.1)
    assert 0.78 < covered < 0.94


def test_the_same_scores_have_the_same_interval_and_equal_ones_a_point():
    scores = draw(np.random.default_rng(2), (3, 40), seed=0.1, prompt=1.0, noise=1.0)
    assert mean_interval(scores) == mean_interval(scores.copy())
    assert mean_interval(np.full((3, 7), 0.25)) == Interval(0.25, 0.25, 0.25)
    assert mean_interval(np.zeros((1, 5))).resolved is False


def test_one_seed_is_not_resampled():
    values = np.random.default_rng(3).normal(size=(10_000, 1))
    assert (over_seeds(values) == values[:, 0]).all()


def test_pairs_have_a_shorter_interval_than_arms_apart():
    generator = np.random.default_rng(4)
    base = draw(generator, (3, 100), prompt=1.0, noise=0.2)
    tuned = base + 0.1 + draw(generator, (3, 100), noise=0.2)
    paired, apart = mean_interval(tuned - base), mean_interval(tuned)
    assert paired.mean == pytest.approx(0.1, abs=0.05) and paired.resolved
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)


def test_every_list_of_as_many_prompts_is_resampled_alike():
    scores = np.random.default_rng(5).normal(size=(30, 4))
    assert over_prompts(scores)[:, 2] == pytest.approx(over_prompts(scores[:, 2]))


@pytest.mark.parametrize("prompts", [0, 1])
def test_an_interval_needs_two_prompts(prompts):
    with pytest.raises(InputError, match=f"at least 2 prompts, got {prompts}"):
        mean_interval(np.zeros((3, prompts)))


def test_what_is_infinite_or_not_defined_leaves_an_end_open():
    values = np.tile([1.0, np.inf], (10_000, 1))
    found = percentiles(np.inf, over_seeds(values))
    assert (found.low, found.high) == (1.0, np.inf)  # a quarter of the resamples drew the first seed alone
    draws = np.concatenate([np.full(9_600, 2.0), np.full(400, np.nan)])
    assert percentiles(2.0, draws) == Interval(2.0, -np.inf, np.inf)
    draws[9_600:9_800] = 2.0
    assert percentiles(2.0, draws) == Interval(2.0, 2.0, 2.0)


def test_an_interval_as_text():
    assert Interval(0.1, -0.25, 1.0).text("+.2f") == "+0.10 [-0.25, +1.00]"
