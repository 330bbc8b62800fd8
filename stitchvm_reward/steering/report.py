"""A comparison of steering methods as tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stitchvm_reward.bootstrap import CONFIDENCE, Interval, mean_interval
from stitchvm_reward.errors import InputError, nearest
from stitchvm_reward.steering.evaluate import ComparisonRecipe, read

COSTS = ("seconds", "gigaflop", "peak_mib")


@dataclass(frozen=True)
class Summary:
    """What was measured of one arm.

    `means` are by measure, with intervals over seeds and prompts, or over prompts alone where there is one seed; not
    all arms have all measures. `differences` are those to the baseline, paired by seed, prompt and noise over the seeds
    that both have (`shared`); empty for the baseline and where there are no such seeds. `costs` are per picture; empty
    where not measured.
    """

    family: str
    label: str
    seeds: list[int]
    means: dict[str, Interval]
    shared: list[int]
    differences: dict[str, Interval]
    costs: dict[str, float]

    @property
    def name(self) -> str:
        """Family and label."""
        return f"{self.family} {self.label}"


Scores = dict[int, dict[str, np.ndarray]]  # of an arm: by seed and measure, (prompts,)


def _scores(recipe: ComparisonRecipe, rows: list[dict[str, Any]]) -> dict[str, Scores]:
    """Return the scores of each measured arm by name, in the recipe's order."""
    found: dict[str, Scores] = {}
    for arm in recipe.arms:
        results = [row for row in rows if (row["family"], row["label"]) == (arm.family, arm.label)]
        for row in sorted(results, key=lambda row: row["seed"]):
            scores = {name: np.array(values, dtype=float) for name, values in row["scores"].items()}
            found.setdefault(arm.name, {})[row["seed"]] = scores
    if not found:
        raise InputError(f"{recipe.out} has no results of this comparison yet; run it without --plot first")
    counts = sorted({len(scores["reward"]) for arm in found.values() for scores in arm.values()})
    if len(counts) > 1:
        raise InputError(
            f"{recipe.out} has results of {counts[0]} and of {counts[-1]} prompts; give another out=FOLDER, or remove "
            "those of one count"
        )
    return found


def measures_of(arms: list[Summary]) -> list[str]:
    """Return the names of the measures of any arm; `founders` is one of the arms of fk alone."""
    return list(dict.fromkeys(name for arm in arms for name in arm.means))


def _stacked(scores: Scores, seeds: list[int], name: str) -> np.ndarray:
    """Return the scores (seeds, prompts) by one measure."""
    return np.stack([scores[seed][name] for seed in seeds])


def summary(recipe: ComparisonRecipe, against: str | None = None) -> list[Summary]:
    """Return the summary of each measured arm, in the recipe's order; differences are to the arm named `against`.

    The default is the first measured arm. Raises InputError if no arm was measured, or if the baseline was not.
    """
    rows, costs = read(Path(recipe.out).expanduser())
    found = _scores(recipe, rows)
    baseline = next(iter(found)) if against is None else against
    if baseline not in found:
        raise InputError(f"--against must name a measured arm, got {baseline!r}: {nearest(baseline, list(found))}")
    base, summaries = found[baseline], []
    for arm in (arm for arm in recipe.arms if arm.name in found):
        own = found[arm.name]
        seeds = list(own)
        shared = [seed for seed in seeds if seed in base] if arm.name != baseline else []
        measures = [name for name in own[seeds[0]] if all(name in own[seed] for seed in seeds)]
        means = {name: mean_interval(_stacked(own, seeds, name)) for name in measures}
        differences = {
            name: mean_interval(_stacked(own, shared, name) - _stacked(base, shared, name))
            for name in measures
            if shared and all(name in base[seed] for seed in shared)
        }
        priced = (cost for cost in costs if (cost["family"], cost["label"]) == (arm.family, arm.label))
        prices = {key: cost[key] for cost in priced for key in COSTS}
        summaries.append(Summary(arm.family, arm.label, seeds, means, shared, differences, prices))
    return summaries


def report(arms: list[Summary], against: str | None = None) -> str:
    """Return a summary as two tables: means and costs, and differences to the baseline that it was made with."""
    measures, width = measures_of(arms), max(len(f"minus {arm.name}") for arm in arms) + 2
    costs = [key for key in COSTS if any(key in arm.costs for arm in arms)]
    header = "".join(f"{name:>24}" for name in measures)
    lines = [f"{'':{width}}seeds{header}" + "".join(f"{name:>11}" for name in costs)]
    for arm in arms:
        means = "".join(f"{arm.means[name].text() if name in arm.means else '-':>24}" for name in measures)
        prices = "".join(f"{arm.costs[key]:11.3f}" if key in arm.costs else f"{'-':>11}" for key in costs)
        lines.append(f"{arm.name:{width}}{len(arm.seeds):5}{means}{prices}")
    baseline = against or arms[0].name
    if len(arms) > 1:
        lines += ["", f"{f'minus {baseline}':{width}}seeds{header}"]
    for arm in arms:
        if arm.name != baseline:
            cells = [arm.differences[name].text("+.3f") if name in arm.differences else "-" for name in measures]
            lines.append(f"{arm.name:{width}}{len(arm.shared):5}" + "".join(f"{cell:>24}" for cell in cells))
    told = f"[{CONFIDENCE:.0%} interval]: bootstrap over prompts and seeds; of one seed, over prompts alone"
    return "\n".join([*lines, "", told])
