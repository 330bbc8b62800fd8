"""Metrics as TensorBoard events in the run folder's subfolder tensorboard."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes events; those of an earlier start from epoch `first` on are purged."""

    def __init__(self, folder: Path, first: int):
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first or None)

    def scalars(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of an epoch."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def histogram(self, epoch: int, name: str, values: Tensor) -> None:
        """Write the distribution of some values."""
        self.writer.add_histogram(name, values, epoch)
        self.writer.flush()

    def images(self, epoch: int, name: str, images: Tensor) -> None:
        """Write images (count, 3, h, w), float in [0, 1] or bytes."""
        self.writer.add_images(name, images, epoch)

    def figure(self, name: str, path: Path) -> None:
        """Write a PNG file."""
        self.writer.add_image(name, np.asarray(Image.open(path, formats=("PNG",)).convert("RGB")), dataformats="HWC")

    def close(self) -> None:
        """Write what is buffered."""
        self.writer.close()
