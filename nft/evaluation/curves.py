"""A run's held-out scores over its epochs, what they cost, and where they reach a target."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.run_folder import arm_of
from stitchvm_reward.runs.tracking import PHASES, read_metrics, read_scores

AXES = {"seconds": "seconds", "teraflop": "TFLOP", "epoch": "epochs"}


@dataclass(frozen=True)
class Curve:
    """One run's evaluations: its cumulative cost on each axis and per phase, (evaluations,), and its scores by measure.

    Scores are (prompts, evaluations), and `prompts` names the list that they are of. The first evaluation is that of
    the untrained policy.
    """

    name: str
    seed: int
    prompts: tuple[str, ...]
    axes: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]

    @property
    def arm(self) -> str:
        """The run's name without its seed."""
        return arm_of(self.name)

    @property
    def measures(self) -> dict[str, np.ndarray]:
        """The mean over prompts of every measure, (evaluations,)."""
        return {name: scores.mean(0) for name, scores in self.scores.items()}


@dataclass(frozen=True)
class Crossing:
    """Where each of several curves first reached a target from below; the evaluations before and after it."""

    reached: np.ndarray
    before: np.ndarray
    after: np.ndarray
    share: np.ndarray

    def at(self, series: np.ndarray) -> np.ndarray:
        """Return a series (evaluations,) or (curves, evaluations) there, by linear interpolation; nan if never."""
        series = np.broadcast_to(series, (len(self.reached), series.shape[-1]))
        rows = np.arange(len(series))
        start, end = series[rows, self.before], series[rows, self.after]
        return np.where(self.reached, start + self.share * (end - start), np.nan)


def crossing(values: np.ndarray, target: float) -> Crossing:
    """Return where each of (curves, evaluations) first reaches the target; at its start if it starts there."""
    above, rows = values >= target, np.arange(len(values))
    after = above.argmax(1)
    before = np.maximum(after - 1, 0)
    start, end = values[rows, before], values[rows, after]
    share = np.divide(target - start, end - start, out=np.zeros(len(values)), where=end > start)
    return Crossing(np.asarray(above.any(1)), before, after, share)


def read_held_out(folder: Path, epochs: list[int]) -> dict[str, np.ndarray]:
    """Return every held-out prompt's scores in some epochs of a run, by measure (prompts, evaluations).

    A measure that not all of these evaluations have is left out. Raises InputError where scores are missing or where
    evaluations have different numbers of prompts.
    """
    found = read_scores(folder)
    if missing := [epoch for epoch in epochs if epoch not in found]:
        raise InputError(
            f"{folder} lacks the scores of each held-out prompt (held_out.jsonl) of epoch {missing[0]}, as runs of "
            "earlier versions do; train it again in another folder"
        )
    names = [name for name in found[epochs[0]] if all(name in found[epoch] for epoch in epochs)]
    counts = sorted({len(scores) for epoch in epochs for scores in found[epoch].values()})
    if len(counts) > 1:
        raise InputError(f"{folder} was evaluated on {counts[0]} prompts and on {counts[-1]}; train it with one number")
    return {name: np.array([found[epoch][name] for epoch in epochs]).T for name in names}


def read_curve(folder: Path) -> Curve:
    """Return the curve of a run folder. Raises InputError where it lacks evaluations or each prompt's scores."""
    axes: dict[str, list[float]] = {axis: [] for axis in (*AXES, *PHASES)}
    spent = dict.fromkeys(axes, 0.0)
    for row in read_metrics(folder):
        for phase in PHASES:
            spent[phase] += row.get(f"seconds/{phase}", 0.0)
        spent["teraflop"] += row.get("cost/teraflop", 0.0)
        spent |= {"seconds": sum(spent[phase] for phase in PHASES), "epoch": row["epoch"]}
        if "held_out/total" in row:
            for axis, value in spent.items():
                axes[axis].append(value)
    if not axes["epoch"]:
        raise InputError(f"{folder} holds no evaluated run; give folders that launch/nft.py wrote")
    scores = read_held_out(folder, [int(epoch) for epoch in axes["epoch"]])
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    prompts = [str(recipe["prompts"].get(key)) for key in ("held_out", "held_out_split", "column")]
    count = len(next(iter(scores.values())))
    costs = {axis: np.array(values, np.float64) for axis, values in axes.items()}
    return Curve(folder.name, recipe["seed"], (*prompts, f"{count} prompts"), costs, scores)
