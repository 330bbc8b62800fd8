"""Summarise runs side by side: python -m nft.evaluation.summary RUN_FOLDER..."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from stitchvm_reward.command import run_command
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.tracking import read_metrics


@dataclass(frozen=True)
class Run:
    """One run's first and last held-out measures, its seconds per phase, its epochs and their cost."""

    folder: Path
    before: dict[str, float]
    after: dict[str, float]
    seconds: dict[str, float]
    epochs: int
    images_per_second: float
    teraflop: float


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises InputError where it holds no evaluation after training."""
    rows = read_metrics(folder)
    held_out = [row for row in rows if "held_out/total" in row]
    epochs = [row for row in rows if "images_per_second" in row]
    if len(held_out) < 2:
        raise InputError(f"{folder} holds no finished run; give folders that launch/nft.py wrote")
    seconds: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("seconds/"):
                seconds[name[8:]] = seconds.get(name[8:], 0.0) + value
    speed = sum(row["images_per_second"] for row in epochs) / len(epochs)
    cost = sum(row.get("cost/teraflop", 0.0) for row in epochs)
    return Run(folder, held_out[0], held_out[-1], seconds, len(epochs), speed, cost)


def summary_lines(runs: list[Run]) -> list[str]:
    """Return the held-out measures before and after each run, its time per phase, and where its images are."""
    lines = [f"{'held out':20}{'before':>9} (spread)" + "".join(f"{run.folder.name:>28}" for run in runs)]
    first = runs[0].before
    for name in first:
        if name.startswith("held_out/") and not name.endswith("_std"):
            cells = [
                f"{run.after[name]:.3f} {run.after[name] - run.before[name]:+.3f} ({run.after[name + '_std']:.3f})"
                if name in run.after
                else "-"
                for run in runs
            ]
            start = f"{name[9:]:20}{first[name]:9.3f}  ({first[name + '_std']:.3f})"
            lines.append(start + "".join(f"{cell:>28}" for cell in cells))
    lines.append("")
    for phase in dict.fromkeys(phase for run in runs for phase in run.seconds):
        shares = [(run.seconds.get(phase, 0.0), sum(run.seconds.values())) for run in runs]
        lines.append(f"{phase:38}" + "".join(f"{part:18.1f} s {part / whole:7.0%}" for part, whole in shares))
    totals = {
        "total seconds": [f"{sum(run.seconds.values()):.1f}" for run in runs],
        "epochs": [f"{run.epochs}" for run in runs],
        "images per second": [f"{run.images_per_second:.1f}" for run in runs],
        "TFLOP": [f"{run.teraflop:.2f}" for run in runs],
    }
    lines += [f"{name:38}" + "".join(f"{value:>28}" for value in values) for name, values in totals.items()]
    return [*lines, "", *(f"images and curves: {run.folder}/before_after.png, curves.png" for run in runs)]


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="run folders")
    print("\n".join(summary_lines([read_run(folder) for folder in parser.parse_args().folders])))


if __name__ == "__main__":
    sys.exit(run_command(run))
