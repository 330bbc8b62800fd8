"""Intervals of means over seeds and held-out prompts, by a bootstrap over both."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from stitchvm_reward.errors import InputError
from stitchvm_reward.runs import randomness

CONFIDENCE = 0.95
DRAWS = 10_000

_PROMPTS, _SEEDS = range(2)


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval. An end is infinite where the resamples set no limit."""

    mean: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def text(self, form: str = ".3f") -> str:
        """Return `mean [low, high]`, each number in a format such as `+.3f`."""
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


@lru_cache(maxsize=8)
def _counts(items: int, axis: int) -> np.ndarray:
    """Return how often each item is in each resample, (DRAWS, items) float64; the same numbers in every process."""
    drawn = torch.randint(items, (DRAWS, items), generator=randomness.at(0, randomness.BOOTSTRAP, axis))
    counts = torch.zeros(DRAWS, items, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts)).numpy()


def over_prompts(scores: np.ndarray) -> np.ndarray:
    """Return the mean over prompts of scores (prompts, ...) in every resample of the prompts, (DRAWS, ...) float64.

    The resamples depend on the number of prompts alone: any two arrays over one list of prompts are resampled alike,
    which keeps their pairs. Raises InputError for fewer than two prompts.
    """
    if len(scores) < 2:
        raise InputError(f"an interval needs the scores of at least 2 prompts, got {len(scores)}")
    return np.tensordot(_counts(len(scores), _PROMPTS), np.asarray(scores, np.float64), 1) / len(scores)


def over_seeds(values: np.ndarray) -> np.ndarray:
    """Return the mean over seeds of values (DRAWS, seeds, ...) in every resample of the seeds, (DRAWS, ...) float64.

    An infinite value counts only where its seed was drawn. One seed is always drawn: it is not resampled.
    """
    counts = _counts(values.shape[1], _SEEDS).reshape(*values.shape[:2], *[1] * (values.ndim - 2))
    return np.multiply(counts, values, where=counts > 0, out=np.zeros(values.shape)).sum(1) / values.shape[1]


def percentiles(mean: float, draws: np.ndarray) -> Interval:
    """Return the 95% percentile interval of an estimate from its resamples (DRAWS,).

    A resample in which it is not defined (nan) counts as low and as high as can be.
    """
    beyond = int(len(draws) * (1 - CONFIDENCE) / 2)
    low = np.sort(np.where(np.isnan(draws), -np.inf, draws))[beyond]
    high = np.sort(np.where(np.isnan(draws), np.inf, draws))[-1 - beyond]
    return Interval(float(mean), float(low), float(high))


def mean_interval(scores: np.ndarray) -> Interval:
    """Return the mean of scores (seeds, prompts) and its 95% interval, which for one array is always the same.

    For two arms give the differences of their scores with the same seeds, prompts and noise. The seeds share the
    prompts. Both are resampled with replacement, independently, and every drawn seed keeps every drawn prompt (the
    pigeonhole bootstrap of Owen, 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1). Of one seed only
    the prompts are resampled: the interval then says nothing about other seeds, and whoever prints it should say so.

    No resampling has the right variance when both axes are random (McCullagh, 2000, "Resampling and exchangeable
    arrays"). With few seeds this one errs on either side:

    - The variance of what is neither the seed's nor the prompt's effect counts 3 - 2 / seeds times. Where there is
      nothing else, the interval is 1.5 times too wide with three seeds.
    - It does not reach beyond the lowest and the highest seed. Where seeds differ by much more than the prompts
      explain, it contains the truth in at most 1 - 2^(1 - seeds) of cases: 75% with three seeds, 94% with five.

    Raises InputError for fewer than two prompts.
    """
    scores = np.asarray(scores, np.float64)
    draws = over_seeds(over_prompts(scores.T))
    return percentiles(scores.mean(), draws)
