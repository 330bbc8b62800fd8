"""Metrics in a local Trackio dashboard, or in the Space that TRACKIO_SPACE_ID names."""

from pathlib import Path
from typing import Any

import numpy as np
import trackio
from PIL import Image
from torch import Tensor

from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.trackers import PROJECT, pixels, run_id


class Trackio:
    """Logs to the run of this folder, which a restart continues."""

    def __init__(self, folder: Path, first: int, config: dict[str, Any] | None):
        name = f"{folder.name}-{run_id(folder, first)}"
        try:
            self.run = trackio.init(project=PROJECT, name=name, config=config, resume="allow", embed=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"tracker trackio cannot start: {str(error).splitlines()[0]}") from None

    def scalars(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an epoch."""
        self.run.log({"epoch": epoch} | metrics, step=epoch)

    def histogram(self, epoch: int, name: str, values: Tensor) -> None:
        """Log the distribution of some values."""
        self.run.log({name: trackio.Histogram(values.detach().float().cpu().numpy())}, step=epoch)

    def images(self, epoch: int, name: str, images: Tensor) -> None:
        """Log images (count, 3, h, w), float in [0, 1] or bytes, in a row."""
        self.run.log({name: trackio.Image(np.concatenate(pixels(images), axis=1))}, step=epoch)

    def figure(self, name: str, path: Path) -> None:
        """Log a PNG file."""
        self.run.log({name: trackio.Image(np.asarray(Image.open(path, formats=("PNG",)).convert("RGB")))})

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()
