"""What arms of runs spent until a held-out measure reached a target, and what else had changed by then."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from nft.evaluation.curves import AXES, Curve, crossing
from stitchvm_reward.bootstrap import Interval, over_prompts, over_seeds, percentiles
from stitchvm_reward.errors import InputError, nearest
from stitchvm_reward.runs.tracking import PHASES

Resampled = dict[str, tuple[float, np.ndarray]]  # by name, a mean over runs and its resamples (DRAWS,)


@dataclass(frozen=True)
class Arm:
    """One arm at a target. Intervals are over its seeds and prompts, or over prompts alone where it has one seed.

    `cost` is by axis and by phase, infinite where not every run reached the target. `change` is that of each measure
    against the untrained policy, nan where `cost` is infinite. `less` tells how many times less than the first arm's
    the cost was, over the seeds that both have (`shared`): empty where there are none, or where a cost is zero or
    infinite.
    """

    name: str
    seeds: list[int]
    reached: int
    cost: dict[str, Interval]
    change: dict[str, Interval]
    shared: list[int]
    less: dict[str, Interval]

    def verdict(self, floor: str) -> str:
        """Return what the interval of the floor's change says: fell, rose, or unresolved."""
        change = self.change[floor]
        return "unresolved" if not change.resolved else "fell" if change.high < 0 else "rose"


def check_comparable(curves: list[Curve], names: list[str]) -> None:
    """Raise InputError unless all runs have these measures and one list of prompts, and no run is there twice."""
    for curve in curves:
        for name in names:
            if name not in curve.scores:
                raise InputError(f"{curve.name} has no measure {name}: {nearest(name, list(curve.scores))}")
        if curve.prompts != curves[0].prompts:
            raise InputError(
                f"{curves[0].name} and {curve.name} were evaluated on different prompts ({', '.join(curves[0].prompts)}"
                f"; {', '.join(curve.prompts)}); compare runs with the same ones"
            )
    for arm, runs in arms_of(curves).items():
        seeds = [run.seed for run in runs]
        if (twice := next((seed for seed in seeds if seeds.count(seed) > 1), None)) is not None:
            raise InputError(f"two runs of {arm} have the seed {twice}; give one of them")


def arms_of(curves: list[Curve]) -> dict[str, list[Curve]]:
    """Return the runs of each arm, in the order in which the arms appear."""
    arms: dict[str, list[Curve]] = {}
    for curve in curves:
        arms.setdefault(curve.arm, []).append(curve)
    return arms


def _at_target(curve: Curve, means: dict[str, np.ndarray], measure: str, target: float) -> dict[str, np.ndarray]:
    """Return costs (curves,) by axis, and changes by `change/NAME`, of several versions of one run's curves.

    `means` are the measures, (curves, evaluations). Where the target is never reached, costs are infinite and changes
    are not defined.
    """
    place = crossing(means[measure], target)
    cost = {axis: np.where(place.reached, place.at(series), np.inf) for axis, series in curve.axes.items()}
    return cost | {f"change/{name}": place.at(series) - series[:, 0] for name, series in means.items()}


def _resampled(runs: list[Curve], measure: str, target: float) -> Resampled:
    """Return the mean over runs, with its resamples, of everything that `_at_target` finds."""
    found, resamples = [], []
    for run in runs:
        found.append(_at_target(run, {name: s.mean(0)[None] for name, s in run.scores.items()}, measure, target))
        means = {name: over_prompts(scores) for name, scores in run.scores.items()}
        resamples.append(_at_target(run, means, measure, target))
    names = [name for name in found[0] if all(name in values for values in found)]
    return {
        name: (
            float(np.mean([values[name][0] for values in found])),
            over_seeds(np.stack([values[name] for values in resamples], 1)),
        )
        for name in names
    }


def _ratios(base: Resampled, other: Resampled) -> dict[str, Interval]:
    """Return by axis how many times the cost of `other` goes into that of `base`, where both are finite and not zero.

    A resample in which both costs are infinite has no ratio, and neither has one in which both are zero.
    """
    ratios = {}
    for axis in AXES:
        (numerator, above), (denominator, below) = base[axis], other[axis]
        if np.isfinite([numerator, denominator]).all() and denominator > 0:
            with np.errstate(invalid="ignore", divide="ignore"):
                ratios[axis] = percentiles(numerator / denominator, above / below)
    return ratios


def compare_arms(curves: list[Curve], measure: str, target: float) -> list[Arm]:
    """Return every arm at the target; the first run's arm is the one that costs are compared with.

    An arm's cost is the mean over its runs of the cost at which each run's curve first reached the target. In each
    resample of the prompts the curves, their crossings and the measures there are computed anew. The resamples of seeds
    and prompts are the same for all arms, so ratios are paired.
    """
    arms = {name: {run.seed: run for run in runs} for name, runs in arms_of(curves).items()}
    first = curves[0].arm

    @cache
    def resampled(name: str, seeds: tuple[int, ...]) -> Resampled:
        return _resampled([arms[name][seed] for seed in seeds], measure, target)

    result = []
    for name, runs in arms.items():
        seeds, shared = tuple(sorted(runs)), tuple(sorted(runs.keys() & arms[first].keys()))
        values = {key: percentiles(*value) for key, value in resampled(name, seeds).items()}
        result.append(
            Arm(
                name,
                list(seeds),
                sum(bool((run.measures[measure] >= target).any()) for run in runs.values()),
                {axis: values[axis] for axis in (*AXES, *PHASES)},
                {key.removeprefix("change/"): v for key, v in values.items() if key.startswith("change/")},
                list(shared),
                _ratios(resampled(first, shared), resampled(name, shared)) if shared else {},
            )
        )
    return result
