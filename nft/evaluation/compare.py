"""Compare the cost at which runs reach a target of a held-out measure:

python -m nft.evaluation.compare runs/full-seed0 runs/stopped-seed0 --measure true_aesthetic --target 7 --out cost.png

Runs whose names differ only in a trailing -seedN form one arm. Time covers rollout, decoding, scoring, auditing and
training, not evaluation and start-up. FLOPs are those of the plan.
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
    """One run's held-out measures and its cumulative cost on each axis and per phase; one entry per evaluation."""

    name: str
    axes: dict[str, list[float]]
    measures: dict[str, list[float]]

    @property
    def arm(self) -> str:
        return arm_of(self.name)


@dataclass(frozen=True)
class Reached:
    """The point at which a run first reached the target: its cost by axis, and all of its measures."""

    cost: dict[str, float]
    measures: dict[str, float]


def read_curve(folder: Path) -> Curve:
    """Return the curve of a run folder. Raises InputError where it holds no evaluations."""
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
    """Return the first crossing of the target from below, interpolated linearly between evaluations, or None."""
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
    """Return one line per run, then one per arm with its mean cost and how many times less that is than the first's."""
    lines = [f"{'run':32}{'epochs':>8}{'seconds':>9}{'TFLOP':>9}   measures at {measure} = {target:g}"]
    arms: dict[str, list[Reached]] = {}
    missed: dict[str, int] = {}
    for curve in curves:
        result = reached(curve, measure, target)
        if result is None:
            missed[curve.arm] = missed.get(curve.arm, 0) + 1
            lines.append(f"{curve.name:32}{'never':>8}   best {max(curve.measures[measure]):.4g}")
            continue
        arms.setdefault(curve.arm, []).append(result)
        measures = "  ".join(f"{name} {value:.3f}" for name, value in result.measures.items() if name != "total")
        cost = result.cost
        lines.append(f"{curve.name:32}{cost['epoch']:8.1f}{cost['seconds']:9.1f}{cost['teraflop']:9.2f}   {measures}")
    lines.append("")
    first: dict[str, float] | None = None
    for arm, results in arms.items():
        mean = {axis: sum(result.cost[axis] for result in results) / len(results) for axis in results[0].cost}
        first = first or mean
        # An arm that starts above the target has a cost of zero.
        ratios = {axis: f"{first[axis] / mean[axis]:.2f}x" if mean[axis] else "-" for axis in ("seconds", "teraflop")}
        times = "  ".join(f"{ratio} less {AXES[axis]}" for axis, ratio in ratios.items())
        short = f", {missed[arm]} never reached it" if arm in missed else ""
        lines.append(f"{arm:32}{mean['epoch']:8.1f}{mean['seconds']:9.1f}{mean['teraflop']:9.2f}   {times}{short}")
        lines.append(f"{'':32}" + "  ".join(f"{phase} {mean[phase]:.1f} s" for phase in PHASES if mean[phase]))
    return lines


def draw(curves: list[Curve], measures: list[str], target: float, path: Path) -> None:
    """Draw each measure over seconds and over FLOPs, in one colour per arm."""
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
            # The costs of the arms differ by orders of magnitude, and every run starts at zero.
            axes.set_xscale("symlog", linthresh=min(cost for curve in curves for cost in curve.axes[axis] if cost > 0))
            axes.set_xlim(left=0)
            axes.set_xlabel(AXES[axis])
            axes.set_ylabel(measure)
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="run folders; the first one's arm is the baseline")
    parser.add_argument("--measure", required=True, help="held-out measure, such as true_aesthetic")
    parser.add_argument("--target", type=float, required=True, help="value to reach")
    parser.add_argument("--out", type=Path, help="PNG file to draw")
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
