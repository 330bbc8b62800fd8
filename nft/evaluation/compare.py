"""Compare the cost at which runs reach targets of a held-out measure:

python -m nft.evaluation.compare runs/full-seed* runs/stopped-seed* --measure true_aesthetic --target 6.9 7.2 \\
    --floor checker --out cost.png --pareto pareto.png --json cost.json

Runs whose names differ only in a trailing -seedN form one arm. Time covers rollout, decoding, scoring, auditing and
training, not evaluation and start-up. FLOPs are those of the plan. Intervals are 95% bootstrap intervals over held-out
prompts and seeds; of an arm with one seed, over prompts alone.
"""

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nft.evaluation.curves import AXES, Curve, crossing, read_curve
from nft.evaluation.targets import Arm, check_comparable, compare_arms
from stitchvm_reward.bootstrap import CONFIDENCE
from stitchvm_reward.command import run_command
from stitchvm_reward.errors import InputError
from stitchvm_reward.files import check_writable, nan_as_null, write_json
from stitchvm_reward.runs.tracking import PHASES

FORMS = {"epoch": ".1f", "seconds": ".1f", "teraflop": ".2f"}


def run_row(curve: Curve, measure: str, target: float) -> dict[str, Any]:
    """Return one run at the target: its cost and its measures there, both None where it never reached it."""
    means = curve.measures
    place = crossing(means[measure][None], target)
    cost = {axis: float(place.at(series)[0]) for axis, series in curve.axes.items()}
    found = {name: float(place.at(series)[0]) for name, series in means.items()}
    return {
        "run": curve.name,
        "arm": curve.arm,
        "seed": curve.seed,
        "best": float(means[measure].max()),
        "cost": cost if place.reached[0] else None,
        "measures": found if place.reached[0] else None,
    }


def run_line(row: dict[str, Any]) -> str:
    """Return the line of a run."""
    if row["cost"] is None:
        return f"{row['run']:36}{'never':>8}   best {row['best']:.4g}"
    costs = "".join(f"{row['cost'][axis]:{width}{form}}" for width, (axis, form) in zip((8, 10, 10), FORMS.items()))
    measures = "  ".join(f"{name} {value:.3f}" for name, value in row["measures"].items() if name != "total")
    return f"{row['run']:36}{costs}   {measures}"


def arm_lines(arm: Arm, first: Arm, measure: str, floor: str | None) -> list[str]:
    """Return the lines of an arm: its cost, how many times less that is, its phases, and what changed meanwhile."""
    seeds = f"{len(arm.seeds)} seeds" if len(arm.seeds) > 1 else "1 seed, over prompts alone"
    costs = "".join(f"{arm.cost[axis].text(form).replace('inf', 'never'):>26}" for axis, form in FORMS.items())
    lines = [f"{f'{arm.name} ({seeds})':36}{costs}"]
    if arm is not first and arm.less:
        ratios = [f"{arm.less[a].text('.2f')} times less {AXES[a]}" for a in FORMS if a in arm.less]
        own = set(arm.seeds) == set(first.seeds)
        lines.append(
            "    " + ", ".join(ratios) + ("" if own else f" (seeds {', '.join(map(str, arm.shared))} of both)")
        )
    elif arm is not first and not arm.shared:
        lines.append(f"    no seed in common with {first.name}: costs are not paired")
    if arm.reached < len(arm.seeds):
        return [*lines, f"    {len(arm.seeds) - arm.reached} of {len(arm.seeds)} runs never reached it"]
    lines.append(
        "    " + "  ".join(f"{phase} {arm.cost[phase].mean:.1f} s" for phase in PHASES if arm.cost[phase].mean)
    )
    # The measure itself is at the target in every resample.
    changes = [f"{name} {c.text('+.3f')}" for name, c in arm.change.items() if name not in (measure, "total")]
    lines.append("    change: " + "  ".join(changes).replace("-inf, +inf", "no limits"))
    if floor is not None:
        lines.append("    " + floor_line(arm, floor))
    return lines


def floor_line(arm: Arm, floor: str) -> str:
    """Return what can be said of the floor: a change only where its interval excludes zero."""
    verdict, change = arm.verdict(floor), arm.change[floor]
    if verdict == "unresolved":
        limited = math.isfinite(change.low)
        most = f"it fell by at most {abs(change.low):.3f}" if limited else "too few resamples reach the target"
        return f"floor: no change of {floor} is resolved; {most}"
    ends = sorted((abs(change.low), abs(change.high)))
    return f"floor: {floor} {verdict} by {ends[0]:.3f} to {ends[1]:.3f}"


def table(curves: list[Curve], arms: list[Arm], measure: str, target: float, floor: str | None = None) -> list[str]:
    """Return one line per run, then the lines of every arm, as `compare_arms` found them at the target."""
    header = f"{'run':36}{'epochs':>8}{'seconds':>10}{'TFLOP':>10}"
    lines = [f"{header}   measures at {measure} = {target:g}"]
    lines += [run_line(run_row(curve, measure, target)) for curve in curves]
    lines += ["", f"{f'arm (mean and {CONFIDENCE:.0%} interval)':36}" + "".join(f"{AXES[a]:>26}" for a in FORMS)]
    return lines + [line for arm in arms for line in arm_lines(arm, arms[0], measure, floor)]


def figures(curves: list[Curve], arms: list[Arm], measure: str, target: float, floor: str | None) -> dict[str, Any]:
    """Return what `table` shows, for a JSON file. An end of an interval that has no limit is None."""
    rows: list[dict[str, Any]] = []
    for arm in arms:
        verdict = None if floor is None else {"measure": floor, "verdict": arm.verdict(floor)}
        rows.append(nan_as_null(asdict(arm) | {"floor": verdict}))
    return {"target": target, "runs": [run_row(curve, measure, target) for curve in curves], "arms": rows}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="run folders; the first one's arm is the baseline")
    parser.add_argument("--measure", required=True, help="held-out measure, such as true_aesthetic")
    parser.add_argument("--target", type=float, nargs="+", required=True, help="values to reach")
    parser.add_argument("--floor", metavar="MEASURE", help="measure that should be kept: tell whether it changed")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="draw every measure over the cost")
    parser.add_argument("--pareto", type=Path, metavar="FILE.png", help="draw the measure against the floor")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    measure, floor = arguments.measure, arguments.floor
    if arguments.pareto is not None and floor is None:
        raise InputError("--pareto draws the measure against a second one; name that with --floor")
    for path in (arguments.out, arguments.pareto, arguments.json):
        if path is not None:
            check_writable(path)
    curves = [read_curve(folder) for folder in arguments.folders]
    check_comparable(curves, [measure, *([floor] if floor is not None else [])])
    found = {target: compare_arms(curves, measure, target) for target in arguments.target}
    print("\n\n".join("\n".join(table(curves, arms, measure, at, floor)) for at, arms in found.items()))
    if arguments.json is not None:
        targets = [figures(curves, arms, measure, at, floor) for at, arms in found.items()]
        about = {"measure": measure, "confidence": CONFIDENCE, "prompts": curves[0].prompts}
        write_json(arguments.json, about | {"targets": targets})
    if arguments.out is not None or arguments.pareto is not None:
        from nft.evaluation.plots import draw, draw_pareto

        if arguments.out is not None:
            shared = [name for name in curves[0].scores if all(name in curve.scores for curve in curves)]
            order = [measure, *(name for name in shared if name not in (measure, "total"))]
            draw(curves, order, arguments.target, arguments.out)
        if arguments.pareto is not None:
            draw_pareto(curves, measure, floor, arguments.pareto)


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(parse())))
