"""Files of one JSON row per epoch in the run folder: metrics.jsonl and held_out.jsonl."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from stitchvm_reward.files import json_text, null_as_nan, staged


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, without a last line that a crash cut short; none where there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(null_as_nan(json.loads(line)))
        except ValueError:
            break
    return rows


class JsonLines:
    """Keeps the rows before epoch `first` that an earlier start left in `path`, and appends to them.

    Pictures are not written.
    """

    def __init__(self, path: Path, first: int):
        self.path = path
        kept = [row for row in read_rows(path) if row["epoch"] < first]
        with staged(path) as file:
            file.write_text("".join(json_text(row) + "\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Append the row of an epoch."""
        with self.path.open("a") as file:
            file.write(json_text(row) + "\n")

    def scalars(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Append the metrics of an epoch."""
        self.append({"epoch": epoch, "step": step} | metrics)

    def histogram(self, epoch: int, name: str, values: Tensor) -> None:
        """Do nothing."""

    def images(self, epoch: int, name: str, images: Tensor) -> None:
        """Do nothing."""

    def figure(self, name: str, path: Path) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing: every row is written at once."""
