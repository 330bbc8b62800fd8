"""Compare runs by what it took them to reach a held-out measure:

python -m nft.evaluation.compare runs/full-seed0 runs/stopped-seed0 --measure true_aesthetic --target 7 --out cost.png

Runs whose names differ only in a trailing -seedN are one arm. Time is that of rollout, decoding, scoring, auditing and
training; evaluation and start-up are left out. FLOPs are the plan's.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from stitchvm_reward.command import run_command
from stitchvm_reward.errors import InputError, nearest
from stitchvm_reward.runs.run_folder import arm_of
from stitchvm_reward.runs.tracking import PHASES, read_metrics

AXES = {"seconds": "seconds", "teraflop": "TFLOP", "epoch": "epochs"}


@dataclass(frozen=True)
class Curve:
    """One run's held-out measures over what it had cost by then, its phases' seconds too; one entry an evaluation."""

    name: str
    axes: dict[str, list[float]]
    measures: dict[str, list[float]]

    @property
    def arm(self) -> str:
        return arm_of(self.name)


@dataclass(frozen=True)
class Reached:
    """Where a run first reached the target: its cost there by axis, and all of its measures there."""

    cost: dict[str, float]
    measures: dict[str, float]


def read_curve(folder: Path) -> Curve:
    """The curve of a run folder. Raises InputError where it holds no evaluations."""
    rows = read_metrics(folder)
    axes: dict[str, list[float]] = {axis: [] for axis in (*AXES, *PHASES)}
    measures: dict[str, list[float]] = {}
    spent = dict.fromkeys(axes, 0.0)
    for row in rows:
        for phase in PHASES:
            spent[phase] += row.get(f"seconds/{phase}", 0.0)
        spent["teraflop"] += row.get("cost/teraflop", 0.0)
        spent |= {"seconds": sum(spent[phase] for phase in PHASES), "epoch": row["epoch"]}
        if "held_out/total" in row:
            for axis, value in spent.items():
                axes[axis].append(value)
            for name, value in row.items():
                if name.startswith("held_out/") and not name.endswith("_std"):
                    measures.setdefault(name.removeprefix("held_out/"), []).append(value)
    if not measures:
        raise InputError(f"{folder} holds no evaluated run; give folders that launch/nft.py wrote")
    return Curve(folder.name, axes, measures)


def reached(curve: Curve, measure: str, target: float) -> Reached | None:
    """The first crossing of the target from below, between two evaluations in proportion; None where there is none."""
    values = curve.measures[measure]
    for index, value in enumerate(values):
        if value >= target:
            share = 1.0 if index == 0 else (target - values[index - 1]) / (value - values[index - 1])

            def at(series: list[float], place: int = index, part: float = share) -> float:
                return series[place] if place == 0 else series[place - 1] + part * (series[place] - series[place - 1])

            return Reached(
                {axis: at(series) for axis, series in curve.axes.items()},
                {name: at(series) for name, series in curve.measures.items()},
            )
    return None


def table(curves: list[Curve], measure: str, target: float) -> list[str]:
    """One line a run, then one an arm with its mean and how many times less it took than the first arm."""
    lines = [f"{'run':32}{'epochs':>8}{'seconds':>9}{'TFLOP':>9}   measures at {measure} = {target:g}"]
    arms: dict[str, list[Reached]] = {}
    missed: dict[str, int] = {}
    for curve in curves:
        found = reached(curve, measure, target)
        if found is None:
            missed[curve.arm] = missed.get(curve.arm, 0) + 1
            lines.append(f"{curve.name:32}{'never':>8}   best {max(curve.measures[measure]):.4g}")
            continue
        arms.setdefault(curve.arm, []).append(found)
        told = "  ".join(f"{name} {value:.3f}" for name, value in found.measures.items() if name != "total")
        cost = found.cost
        lines.append(f"{curve.name:32}{cost['epoch']:8.1f}{cost['seconds']:9.1f}{cost['teraflop']:9.2f}   {told}")
    lines.append("")
    first: dict[str, float] | None = None
    for arm, all_found in arms.items():
        mean = {axis: sum(found.cost[axis] for found in all_found) / len(all_found) for axis in all_found[0].cost}
        first = first or mean
        # An arm that begins above the target has spent nothing.
        ratios = {axis: f"{first[axis] / mean[axis]:.2f}x" if mean[axis] else "-" for axis in ("seconds", "teraflop")}
        times = "  ".join(f"{ratio} less {AXES[axis]}" for axis, ratio in ratios.items())
        short = f", {missed[arm]} never reached it" if arm in missed else ""
        lines.append(f"{arm:32}{mean['epoch']:8.1f}{mean['seconds']:9.1f}{mean['teraflop']:9.2f}   {times}{short}")
        lines.append(f"{'':32}" + "  ".join(f"{phase} {mean[phase]:.1f} s" for phase in PHASES if mean[phase]))
    return lines


def draw(curves: list[Curve], measures: list[str], target: float, path: Path) -> None:
    """Each measure over seconds and over FLOPs, one colour an arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2 * len(measures)), layout="constrained")
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    for row, measure in enumerate(measures):
        for column, axis in enumerate(("seconds", "teraflop")):
            axes = figure.add_subplot(len(measures), 2, 2 * row + column + 1)
            for curve in curves:
                label = curve.arm if next(c for c in curves if c.arm == curve.arm) is curve else None
                colour = f"C{arms.index(curve.arm) % 10}"
                axes.plot(curve.axes[axis], curve.measures[measure], color=colour, label=label, alpha=0.8)
            if row == 0:
                axes.axhline(target, color="grey", linestyle=":")
                axes.legend(fontsize=7)
            # The arms lie far apart, and every run begins at a cost of nothing.
            axes.set_xscale("symlog", linthresh=min(cost for curve in curves for cost in curve.axes[axis] if cost > 0))
            axes.set_xlim(left=0)
            axes.set_xlabel(AXES[axis])
            axes.set_ylabel(measure)
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="run folders; the first one's arm is compared with")
    parser.add_argument("--measure", required=True, help="held-out measure, such as true_aesthetic")
    parser.add_argument("--target", type=float, required=True, help="value that has to be reached")
    parser.add_argument("--out", type=Path, help="PNG to draw")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    curves = [read_curve(folder) for folder in arguments.folders]
    for curve in curves:
        if arguments.measure not in curve.measures:
            hint = nearest(arguments.measure, list(curve.measures))
            raise InputError(f"{curve.name} has no measure {arguments.measure}: {hint}")
    print("\n".join(table(curves, arguments.measure, arguments.target)))
    if arguments.out is not None:
        shared = [name for name in curves[0].measures if all(name in curve.measures for curve in curves)]
        order = [arguments.measure, *(name for name in shared if name not in (arguments.measure, "total"))]
        draw(curves, order, arguments.target, arguments.out)


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(parse())))
