"""Summarise runs side by side: python -m nft.evaluation.summary RUN_FOLDER...

Changes have 95% bootstrap intervals over held-out prompts, paired by prompt and noise.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nft.evaluation.curves import read_held_out
from stitchvm_reward.bootstrap import CONFIDENCE, mean_interval
from stitchvm_reward.command import run_command
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.tracking import read_metrics

START = 40  # width of the columns before those of the runs
CELL = 46  # width of a run's column


@dataclass(frozen=True)
class Run:
    """One run's first and last held-out scores (prompts,), its seconds per phase, its epochs and their cost."""

    folder: Path
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    seconds: dict[str, float]
    epochs: int
    images_per_second: float
    teraflop: float


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises InputError where it holds no evaluation after training, or not each prompt's scores."""
    rows = read_metrics(folder)
    held_out = [row for row in rows if "held_out/total" in row]
    epochs = [row for row in rows if "images_per_second" in row]
    if len(held_out) < 2:
        raise InputError(f"{folder} holds no finished run; give folders that launch/nft.py wrote")
    scores = read_held_out(folder, [int(held_out[place]["epoch"]) for place in (0, -1)])
    before, after = ({name: values[:, place] for name, values in scores.items()} for place in (0, 1))
    seconds: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("seconds/"):
                seconds[name[8:]] = seconds.get(name[8:], 0.0) + value
    speed = sum(row["images_per_second"] for row in epochs) / len(epochs)
    cost = sum(row.get("cost/teraflop", 0.0) for row in epochs)
    return Run(folder, before, after, seconds, len(epochs), speed, cost)


def change(run: Run, name: str) -> str:
    """Return a measure after a run, its spread, and its change with the interval over prompts."""
    if name not in run.after:
        return "-"
    difference = mean_interval((run.after[name] - run.before[name])[None])
    return f"{run.after[name].mean():.3f} ({run.after[name].std(ddof=1):.3f}) {difference.text('+.3f')}"


def summary_lines(runs: list[Run]) -> list[str]:
    """Return the held-out measures before and after each run, its time per phase, and where its images are."""
    title = f"{'held out':20}{'before':>9} (spread)"
    lines = [f"{title:{START}}" + "".join(f"{run.folder.name:>{CELL}}" for run in runs)]
    for name, before in runs[0].before.items():
        start = f"{name:20}{before.mean():9.3f}  ({before.std(ddof=1):.3f})"
        lines.append(f"{start:{START}}" + "".join(f"{change(run, name):>{CELL}}" for run in runs))
    told = f"after (spread) and change [{CONFIDENCE:.0%} interval over prompts]"
    lines += [f"{'':{START}}{told:>{CELL * len(runs)}}", ""]
    for phase in dict.fromkeys(phase for run in runs for phase in run.seconds):
        shares = [(run.seconds.get(phase, 0.0), sum(run.seconds.values())) for run in runs]
        lines.append(
            f"{phase:{START}}" + "".join(f"{part:{CELL - 10}.1f} s {part / whole:7.0%}" for part, whole in shares)
        )
    totals = {
        "total seconds": [f"{sum(run.seconds.values()):.1f}" for run in runs],
        "epochs": [f"{run.epochs}" for run in runs],
        "images per second": [f"{run.images_per_second:.1f}" for run in runs],
        "TFLOP": [f"{run.teraflop:.2f}" for run in runs],
    }
    lines += [f"{name:{START}}" + "".join(f"{value:>{CELL}}" for value in values) for name, values in totals.items()]
    return [*lines, "", *(f"images and curves: {run.folder}/before_after.png, curves.png" for run in runs)]


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="run folders")
    print("\n".join(summary_lines([read_run(folder) for folder in parser.parse_args().folders])))


if __name__ == "__main__":
    sys.exit(run_command(run))
