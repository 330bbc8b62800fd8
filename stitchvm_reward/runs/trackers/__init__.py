"""Writers of metrics, one module per destination.

Every writer has `scalars`, `histogram`, `images`, `figure` and `close`.
"""

import uuid
from pathlib import Path

import numpy as np
from torch import Tensor

PROJECT = "stitch-nft"


def run_id(folder: Path, first: int) -> str:
    """Return the name under which services know the run in `folder`: a new one unless it continues at `first` > 0."""
    path = folder / "tracker_id"
    if not first or not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text().strip()


def pixels(images: Tensor) -> list[np.ndarray]:
    """Return images (count, 3, h, w), float in [0, 1] or bytes, as arrays (h, w, 3) of bytes."""
    if images.is_floating_point():
        images = (images.clamp(0, 1) * 255).round().byte()
    return [image.permute(1, 2, 0).cpu().numpy() for image in images]
