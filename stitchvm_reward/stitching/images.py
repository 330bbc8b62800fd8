"""Unlabelled images from a folder or a hub data set, cropped to squares of one size."""

import hashlib
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stitchvm_reward.errors import InputError, nearest
from stitchvm_reward.hub import is_hub_id
from stitchvm_reward.rewards.preprocess import resize_and_crop

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")  # whatever a file's name: Pillow would start Ghostscript for PostScript


@dataclass(frozen=True)
class ImageSet:
    """Images by name. `read` returns the bytes of an image, `caption` its caption; `key` identifies the set."""

    names: list[str]
    read: Callable[[int], bytes]
    caption: Callable[[int], str]
    key: str

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int, side: int) -> Tensor | None:
        """Return an image's centre square, (3, side, side) float32 in [0, 1]; None if the file is broken or empty."""
        try:
            with Image.open(io.BytesIO(self.read(index)), formats=FORMATS) as opened:
                pixels = np.asarray(opened.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError):
            return None
        if min(pixels.shape[:2]) < 2:
            return None
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        return resize_and_crop(image, side)[0]


def find_images(source: str, split: str, column: str, captions: str, limit: int) -> ImageSet:
    """Return the images of a folder, in the order of their names, or of a hub data set.

    Raises InputError if the folder or data set is missing or has no images.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[: limit or None]
        if not paths:
            raise InputError(f"{folder} has no images ({', '.join(SUFFIXES)})")
        digest = hashlib.sha256("".join(f"{p.relative_to(folder)}:{p.stat().st_size};" for p in paths).encode())
        return ImageSet(
            [str(path.relative_to(folder)) for path in paths],
            lambda index: paths[index].read_bytes(),
            lambda index: _folder_caption(paths[index]),
            digest.hexdigest(),
        )
    if not is_hub_id(source):
        raise InputError(f"image folder not found: {source}; give a folder or a hub data set owner/name")
    return _from_hub(source, split, column, captions, limit)


def _folder_caption(path: Path) -> str:
    file = path.with_suffix(".txt")
    if not file.is_file():
        raise InputError(f"{path.name} has no caption: {file.name} is missing (backbone.conditioning is prompt)")
    return file.read_text(encoding="utf-8").strip()


def _from_hub(source: str, split: str, column: str, captions: str, limit: int) -> ImageSet:
    from datasets import Image as ImageFeature
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from datasets.utils.logging import disable_progress_bar, set_verbosity

    disable_progress_bar()
    set_verbosity(logging.CRITICAL)
    try:
        table = load_dataset(source, split=split)
    except (DatasetNotFoundError, DatasetGenerationError, FileNotFoundError, ConnectionError, ValueError) as error:
        raise InputError(f"data set {source} cannot be loaded: {str(error).splitlines()[0]}") from None
    if column not in table.column_names:
        raise InputError(f"{source} has no column {column!r} (data.column): {nearest(column, table.column_names)}")
    table = table.cast_column(column, ImageFeature(decode=False))  # one broken image must not stop the run
    count = min(limit or len(table), len(table))
    if not count:
        raise InputError(f"{source} has no images")

    def read(index: int) -> bytes:
        item = table[index][column]
        return item["bytes"] or Path(item["path"]).read_bytes()

    def caption(index: int) -> str:
        if captions not in table.column_names:
            raise InputError(f"{source} has no column {captions!r} (data.captions)")
        return str(table[index][captions])

    names = [f"{split}[{index}]" for index in range(count)]
    return ImageSet(names, read, caption, hashlib.sha256(f"{table._fingerprint}|{count}".encode()).hexdigest())
