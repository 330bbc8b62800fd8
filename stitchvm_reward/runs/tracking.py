"""What a run leaves behind to look at: metrics.jsonl, TensorBoard events, picture grids, curves."""

import json
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from stitchvm_reward.files import staged


class Timings:
    """Seconds spent per phase since the last `take`, and which phase was entered last, `current`.

    The seconds of a phase inside another one are its own alone.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.current, self.moved, self._inner = "start", time.monotonic(), 0.0

    def move(self) -> None:
        """Note that the work goes on."""
        self.moved = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; what a phase inside it takes is not counted twice."""
        self.current = name
        with self._timed(name):
            yield

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Time what a process waits for others, in whatever phase, as the phase `meet`."""
        phase = self.current
        self.current = f"{phase}, where it meets the others"
        with self._timed("meet"):
            yield
        self.current = phase

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start, outer, self._inner = time.perf_counter(), self._inner, 0.0
        self.move()
        try:
            yield
        finally:
            self.move()
            whole = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - self._inner
            self._inner = outer + whole

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return {f"seconds/{name}": value for name, value in taken.items()}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl; a last line cut short by a crash is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Tracker:
    """Writes one row of metrics per epoch, on the main process; of an earlier start, those before `first` are kept."""

    def __init__(self, folder: Path, first: int):
        self.folder = folder
        kept = [row for row in read_metrics(folder) if row["epoch"] < first]
        with staged(folder / "metrics.jsonl") as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first or None)

    def log(self, epoch: int, step: int, metrics: dict[str, float], optimality: Tensor | None = None) -> None:
        """Add the row of an epoch."""
        row = {"epoch": epoch, "step": step} | metrics
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, epoch)
        if optimality is not None:
            self.writer.add_histogram("optimality", optimality, epoch)
        self.writer.flush()

    def images(self, epoch: int, images: Tensor) -> None:
        """Show (count, 3, h, w) images in bytes, always of the same noise, side by side over epochs."""
        self.writer.add_images("held_out", images, epoch)

    def figure(self, name: str, path: Path) -> None:
        """Show a PNG file."""
        self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def _picture(image: Tensor, side: int) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    # Small pictures are enlarged as they are; a large one that is shrunk so would be full of steps.
    kind = Image.Resampling.NEAREST if image.shape[-1] <= side else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((side, side), kind)


def _shortened(prompt: str, width: int, lines: int = 2) -> str:
    """A prompt broken into lines of `width` pixels, its end left out where they do not hold it."""
    return "\n".join(textwrap.wrap(prompt, max(8, width // 6), max_lines=lines, placeholder=" …"))


def picture_grid(columns: dict[str, Tensor], prompts: list[str], path: Path, across: int = 1) -> None:
    """Save images (count, 3, h, w) in [0, 1] as PNG: per prompt one of each named column, side by side above it.

    `across` prompts stand in a row, under a header with the columns' names.
    """
    own = next(iter(columns.values())).shape[-1]
    side = max(96, own // (1 if own < 256 else 2))
    across, margin, header, caption = min(across, len(prompts)), 6, 20, 32
    width, height = len(columns) * (side + margin) - margin, side + caption
    rows = -(-len(prompts) // across)
    sheet = Image.new("RGB", (across * (width + 2 * margin), rows * (height + margin) + header), "white")
    draw = ImageDraw.Draw(sheet)
    for index, prompt in enumerate(prompts):
        left = (index % across) * (width + 2 * margin) + margin
        top = (index // across) * (height + margin) + header
        for place, (name, images) in enumerate(columns.items()):
            start = left + place * (side + margin)
            sheet.paste(_picture(images[index], side), (start, top))
            if index < across:
                draw.text((start, 4), name, fill="black")
        draw.multiline_text((left, top + side + 3), _shortened(prompt, width), fill="black", spacing=2)
    sheet.save(path, optimize=True)


def before_after(before: Tensor, after: Tensor, prompts: list[str], path: Path) -> None:
    """Save pairs of images (count, 3, h, w) in [0, 1] with their prompts, base left and tuned right, as PNG."""
    picture_grid({"before": before, "after": after}, prompts, path, across=4)


def curves(folder: Path) -> None:
    """Draw every held-out measure, the training reward and old_deviation over epochs as curves.png."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    names = [
        name
        for row in rows
        for name in row
        if name.startswith(("held_out/", "reward/total", "train/old_dev", "train/loss", "cosine/", "spearman/"))
    ]
    names = [name for name in dict.fromkeys(names) if not name.endswith(("_std", "/total_std"))]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3 * lines))
    # A layout that is computed would draw everything twice.
    figure.subplots_adjust(
        0.6 / (4.2 * columns), 0.5 / (3 * lines), 1 - 0.1 / columns, 1 - 0.3 / (3 * lines), 0.3, 0.45
    )
    for index, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, index + 1)
        known = [row for row in rows if name in row]
        axes.plot([row["epoch"] for row in known], [row[name] for row in known], marker="." if len(known) < 40 else "")
        axes.set_title(name)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=110)
