"""Plots of a comparison of steering methods."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stitchvm_reward.bootstrap import Interval
from stitchvm_reward.errors import InputError, nearest
from stitchvm_reward.steering.report import Summary, measures_of

LABELS = {"seconds": "seconds per picture", "gigaflop": "GFLOP per picture", "peak_mib": "peak MiB"}


def _bars(intervals: list[Interval]) -> np.ndarray:
    """Return the lengths below and above of error bars that end where the intervals do, (2, count)."""
    # Rounding can put the mean of equal scores outside by a last digit.
    return np.maximum(0, [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]])


def draw(arms: list[Summary], path: Path) -> None:
    """Draw every measure over the seconds per picture, and the reward over GFLOP and peak memory, as a PNG file.

    Error bars are the intervals of the means. Each family is one curve. Where no costs were measured, the measures are
    drawn over the arms.
    """
    priced = all(arm.costs for arm in arms)
    panels = [(name, "seconds") for name in measures_of(arms)]
    panels += [("reward", "gigaflop"), ("reward", "peak_mib")] if priced else []
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.2 * across, 3.8 * down), layout="constrained")
    for place, (name, cost) in enumerate(panels):
        axes = figure.add_subplot(down, across, place + 1)
        for number, family in enumerate(dict.fromkeys(arm.family for arm in arms)):
            members = [arm for arm in arms if arm.family == family and name in arm.means]
            positions = [arm.costs[cost] if priced else arms.index(arm) for arm in members]
            means = [arm.means[name] for arm in members]
            heights = [mean.mean for mean in means]
            axes.errorbar(positions, heights, _bars(means), fmt=".-", color=f"C{number % 10}", label=family)
            for x, y, arm in zip(positions, heights, members):
                axes.annotate(arm.label, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.set_xlabel(LABELS[cost] if priced else "arm")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if place == 0:
            axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def front(points: list[tuple[float, float]]) -> list[int]:
    """Return the places of the points that no other one exceeds in both numbers, by the first one."""
    order = sorted(range(len(points)), key=lambda place: points[place], reverse=True)
    kept: list[int] = []
    for place in order:
        if not kept or points[place][1] > points[kept[-1]][1]:
            kept.append(place)
    return kept[::-1]


def _scatter(axes: Axes, arms: list[Summary], across: list[Interval], up: list[Interval]) -> None:
    """Draw one marker with error bars per arm, in the colour of its family."""
    for number, family in enumerate(dict.fromkeys(arm.family for arm in arms)):
        places = [place for place, arm in enumerate(arms) if arm.family == family]
        x, y = ([values[place] for place in places] for values in (across, up))
        axes.errorbar(
            [value.mean for value in x],
            [value.mean for value in y],
            xerr=_bars(x),
            yerr=_bars(y),
            fmt="osD^v"[number // 10 % 5],  # colours repeat after ten families
            color=f"C{number % 10}",
            label=family,
            markersize=5,
            linewidth=0.8,
        )
    for arm, x_mean, y_mean in zip(arms, across, up):
        place = (x_mean.mean, y_mean.mean)
        axes.annotate(arm.label, place, fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.grid(alpha=0.3)


def _join(axes: Axes, points: list[tuple[float, float]]) -> None:
    axes.plot(*zip(*points), color="grey", linewidth=0.8, zorder=0)


def draw_pareto(arms: list[Summary], floor: str, path: Path) -> None:
    """Draw a measure to be kept (`floor`) against the reward and, where it was measured, the reward against GFLOP.

    A line joins the arms that no other arm exceeds in both (the Pareto front). Raises InputError if not every
    arm has that measure.
    """
    everywhere = [name for name in measures_of(arms) if all(name in arm.means for arm in arms)]
    if floor not in everywhere:
        raise InputError(f"--floor must name a measure of every arm, got {floor!r}: {nearest(floor, everywhere)}")
    rewards, floors = [arm.means["reward"] for arm in arms], [arm.means[floor] for arm in arms]
    priced = all(arm.costs for arm in arms)
    figure = Figure(figsize=(12.5 if priced else 6.5, 5), layout="constrained")
    axes = figure.add_subplot(1, 2 if priced else 1, 1)
    _scatter(axes, arms, rewards, floors)
    points = [(reward.mean, kept.mean) for reward, kept in zip(rewards, floors)]
    _join(axes, [points[place] for place in front(points)])
    axes.set_xlabel("reward")
    axes.set_ylabel(floor)
    axes.legend(fontsize=7)
    if priced:
        axes = figure.add_subplot(1, 2, 2)
        costs = [arm.costs["gigaflop"] for arm in arms]
        _scatter(axes, arms, [Interval(cost, cost, cost) for cost in costs], rewards)
        points = [(cost, reward.mean) for cost, reward in zip(costs, rewards)]
        _join(axes, [points[place] for place in front([(-cost, reward) for cost, reward in points])])
        axes.set_xscale("log")
        axes.set_xlabel(LABELS["gigaflop"])
        axes.set_ylabel("reward")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
