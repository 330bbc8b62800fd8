"""Metrics as metrics.jsonl in the run folder: one row per epoch."""

import json
from pathlib import Path

from torch import Tensor

from stitchvm_reward.files import staged


class JsonLines:
    """Starts metrics.jsonl from the `kept` rows of an earlier start and appends to it. Pictures are not written."""

    def __init__(self, folder: Path, kept: list[dict[str, float]]):
        self.path = folder / "metrics.jsonl"
        with staged(self.path) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def scalars(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Append the row of an epoch."""
        with self.path.open("a") as file:
            file.write(json.dumps({"epoch": epoch, "step": step} | metrics) + "\n")

    def histogram(self, epoch: int, name: str, values: Tensor) -> None:
        """Do nothing."""

    def images(self, epoch: int, name: str, images: Tensor) -> None:
        """Do nothing."""

    def figure(self, name: str, path: Path) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing: every row is written at once."""
