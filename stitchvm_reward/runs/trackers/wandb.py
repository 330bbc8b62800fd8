"""Metrics at Weights & Biases, under the account of `wandb login`."""

import os
from pathlib import Path
from typing import Any

import wandb
from torch import Tensor

from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.trackers import PROJECT, pixels, run_id


class WeightsAndBiases:
    """Logs to the run of this folder, which a restart continues. WANDB_PROJECT replaces the project's name."""

    def __init__(self, folder: Path, first: int, config: dict[str, Any] | None):
        name = run_id(folder, first)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        try:
            self.run = wandb.init(
                project=project, id=name, name=folder.name, dir=str(folder), config=config, resume="allow"
            )
        except wandb.Error as error:
            raise InputError(f"tracker wandb cannot start: {str(error).splitlines()[0]}") from None
        # Not wandb's own step, which must rise: a restart writes some epochs again.
        self.run.define_metric("*", step_metric="epoch")

    def scalars(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an epoch."""
        self.run.log({"epoch": epoch, "step": step} | metrics)

    def histogram(self, epoch: int, name: str, values: Tensor) -> None:
        """Log the distribution of some values."""
        self.run.log({"epoch": epoch, name: wandb.Histogram(values.detach().float().cpu().numpy())})

    def images(self, epoch: int, name: str, images: Tensor) -> None:
        """Log images (count, 3, h, w), float in [0, 1] or bytes."""
        self.run.log({"epoch": epoch, name: [wandb.Image(image) for image in pixels(images)]})

    def figure(self, name: str, path: Path) -> None:
        """Log a PNG file."""
        self.run.log({name: wandb.Image(str(path))})

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()
