"""Plots of held-out measures: over what they cost, and one against another."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nft.evaluation.curves import AXES, Curve
from nft.evaluation.targets import arms_of
from stitchvm_reward.bootstrap import CONFIDENCE, mean_interval
from stitchvm_reward.runs.pictures import save_figure


def draw(curves: list[Curve], measures: list[str], targets: list[float], path: Path) -> None:
    """Draw each measure over seconds and over FLOPs, in one colour per arm; targets are those of the first measure."""
    figure = Figure(figsize=(10, 3.2 * len(measures)), layout="constrained")
    for row, measure in enumerate(measures):
        for column, axis in enumerate(("seconds", "teraflop")):
            axes = figure.add_subplot(len(measures), 2, 2 * row + column + 1)
            for number, (arm, runs) in enumerate(arms_of(curves).items()):
                for curve in runs:
                    label = arm if curve is runs[0] else None
                    values = curve.measures[measure]
                    axes.plot(curve.axes[axis], values, color=f"C{number % 10}", label=label, alpha=0.8)
            if row == 0:
                for target in targets:
                    axes.axhline(target, color="grey", linestyle=":")
                axes.legend(fontsize=7)
            # The costs of the arms differ by orders of magnitude, and every run starts at zero.
            axes.set_xscale("symlog", linthresh=min(cost for curve in curves for cost in curve.axes[axis] if cost > 0))
            axes.set_xlim(left=0)
            axes.set_xlabel(AXES[axis])
            axes.set_ylabel(measure)
            axes.grid(alpha=0.3)
    save_figure(figure, path)


def pareto_curve(runs: list[Curve], measure: str, floor: str) -> tuple[np.ndarray, np.ndarray]:
    """Return an arm's means of two measures over its runs, (epochs,) each, in the epochs that all of them evaluated."""
    epochs = sorted(set.intersection(*({*run.axes["epoch"].tolist()} for run in runs)))
    places = [np.isin(run.axes["epoch"], epochs) for run in runs]
    means = [np.mean([run.measures[name][place] for run, place in zip(runs, places)], 0) for name in (measure, floor)]
    return means[0], means[1]


def draw_pareto(curves: list[Curve], measure: str, floor: str, path: Path) -> None:
    """Draw the floor against the measure over the epochs, one curve per arm.

    The band is the interval of the untrained policy's floor, over the first arm's seeds and prompts.
    """
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes, arms = figure.add_subplot(), arms_of(curves)
    for number, (arm, runs) in enumerate(arms.items()):
        across, up = pareto_curve(runs, measure, floor)
        axes.plot(across, up, ".-", color=f"C{number % 10}", label=arm, alpha=0.8)
    first = arms[curves[0].arm]
    base = mean_interval(np.array([run.scores[floor][:, 0] for run in first]))
    start = float(np.mean([run.measures[measure][0] for run in first]))
    axes.axhspan(base.low, base.high, color="grey", alpha=0.15, label=f"untrained, {CONFIDENCE:.0%} interval")
    axes.plot(start, base.mean, "k*", markersize=12, label="untrained")
    axes.set_xlabel(measure)
    axes.set_ylabel(floor)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    save_figure(figure, path)
