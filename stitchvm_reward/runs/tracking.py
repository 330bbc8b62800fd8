"""What a run records while it trains: the time of its phases, and its metrics wherever the recipe sends them."""

import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stitchvm_reward.errors import InputError, nearest
from stitchvm_reward.runs.trackers.jsonl import JsonLines, read_rows

TRACKERS = ("jsonl", "tensorboard", "wandb", "trackio")
DEFAULT_TRACKERS = ("jsonl", "tensorboard")

PHASES = ("rollout", "decode", "score", "audit", "train", "meet")  # of an epoch
SHOWN = ("reward/total", "train/old_deviation", "held_out/total")


def waiting_for(device: torch.device) -> Callable[[], None]:
    """Return a call that waits until a device has done what this program has asked of it; nothing on a CPU."""
    if device.type != "cuda":
        return lambda: None
    return lambda: torch.cuda.current_stream(device).synchronize()


class Timings:
    """Seconds spent per phase since the last `take`; `current` is the phase that was entered last.

    A phase inside another one is not counted twice. A GPU works behind the program that feeds it: `synchronise` waits
    for it where a phase begins and ends, so that its work counts in the phase that asked for it.
    """

    def __init__(self, synchronise: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter):
        self.synchronise, self.clock = synchronise, clock
        self.seconds: dict[str, float] = {}
        self.current, self.moved, self._inner = "start", time.monotonic(), 0.0

    def move(self) -> None:
        """Record that the work advances."""
        self.moved = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, without the phases inside it."""
        self.current = name
        with self._timed(name):
            yield

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Time what a process waits for other processes, in any phase, as the phase `meet`."""
        phase = self.current
        self.current = f"{phase}, waiting for other processes"
        with self._timed("meet"):
            yield
        self.current = phase

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self.synchronise()
        start, outer, self._inner = self.clock(), self._inner, 0.0
        self.move()
        try:
            yield
            self.synchronise()
        finally:
            self.move()
            total = self.clock() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + total - self._inner
            self._inner = outer + total

    def take(self) -> dict[str, float]:
        """Return the seconds per phase as metrics, and start again from zero."""
        taken, self.seconds = self.seconds, {}
        return {f"seconds/{name}": value for name, value in taken.items()}


def epoch_seconds(metrics: dict[str, float]) -> float:
    """Return what an epoch took, without evaluation, saving and start-up."""
    return sum(metrics.get(f"seconds/{phase}", 0.0) for phase in PHASES)


def epoch_line(metrics: dict[str, float]) -> str:
    """Return what the terminal shows of an epoch's metrics."""
    shown = [f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics]
    return "  ".join([*shown, f"{epoch_seconds(metrics):.1f} s"])


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's metrics.jsonl, without a last line that a crash cut short."""
    return read_rows(folder / "metrics.jsonl")


def read_scores(folder: Path) -> dict[int, dict[str, list[float]]]:
    """Return each held-out prompt's scores by epoch and measure, from a run's held_out.jsonl; none where it is absent.

    Prompts are in the order of the run's list, and every epoch's images come from the same noise, so the scores of two
    epochs are pairs.
    """
    return {row["epoch"]: row["scores"] for row in read_rows(folder / "held_out.jsonl")}


def check_trackers(kinds: Iterable[str]) -> None:
    """Raise InputError for a tracker that does not exist or is not installed."""
    for kind in kinds:
        if kind not in TRACKERS:
            raise InputError(f"unknown tracker {kind!r}: {nearest(kind, list(TRACKERS))}")
        # A folder of that name in the working directory has a specification too, but no origin.
        if kind != "jsonl" and getattr(importlib.util.find_spec(kind), "origin", None) is None:
            raise InputError(f"tracker {kind} is not installed: pip install {kind}, or remove it from tracking")


class Tracker:
    """Writes one row of metrics per epoch, on the main process, to every tracker of `kinds` and to metrics.jsonl.

    Of an earlier start, the rows before epoch `first` are kept. `config` is the recipe, which wandb and trackio show.
    """

    def __init__(
        self,
        folder: Path,
        first: int,
        kinds: Iterable[str] = DEFAULT_TRACKERS,
        config: dict[str, Any] | None = None,
    ):
        kinds = dict.fromkeys(("jsonl", *kinds))
        check_trackers(kinds)
        self.writers = [_open(kind, folder, first, config) for kind in kinds]
        self.folder, self.first = folder, first

    def log(
        self, epoch: int, step: int, metrics: dict[str, float], histograms: dict[str, Tensor] | None = None
    ) -> None:
        """Write the row of an epoch, and distributions by name."""
        for writer in self.writers:
            writer.scalars(epoch, step, metrics)
            for name, values in (histograms or {}).items():
                writer.histogram(epoch, name, values)

    @cached_property
    def held_out(self) -> JsonLines:
        """Each held-out prompt's scores; only runs that evaluate have this file."""
        return JsonLines(self.folder / "held_out.jsonl", self.first)

    def scores(self, epoch: int, scores: dict[str, Tensor]) -> None:
        """Append each held-out prompt's scores (prompts,), by measure, to held_out.jsonl; see `read_scores`."""
        rounded = {name: [float(f"{value:.7g}") for value in values.tolist()] for name, values in scores.items()}
        self.held_out.append({"epoch": epoch, "scores": rounded})

    def images(self, epoch: int, images: Tensor) -> None:
        """Show held-out images (count, 3, h, w), always of the same noise, so that epochs can be compared."""
        for writer in self.writers:
            writer.images(epoch, "held_out", images)

    def figure(self, name: str, path: Path) -> None:
        """Show a PNG file."""
        for writer in self.writers:
            writer.figure(name, path)

    def close(self) -> None:
        """Write what is buffered."""
        for writer in self.writers:
            writer.close()


def _open(kind: str, folder: Path, first: int, config: dict[str, Any] | None) -> Any:
    # Imported here: a tracker that is not used need not be installed.
    if kind == "jsonl":
        return JsonLines(folder / "metrics.jsonl", first)
    if kind == "tensorboard":
        from stitchvm_reward.runs.trackers.tensorboard import TensorBoard

        return TensorBoard(folder, first)
    if kind == "wandb":
        from stitchvm_reward.runs.trackers.wandb import WeightsAndBiases

        return WeightsAndBiases(folder, first, config)
    from stitchvm_reward.runs.trackers.trackio import Trackio

    return Trackio(folder, first, config)
