"""Pictures of a run: grids of samples with their prompts, and curves of its metrics."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw
from torch import Tensor

from stitchvm_reward.errors import InputError
from stitchvm_reward.files import staged
from stitchvm_reward.runs.tracking import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _picture(image: Tensor, side: int) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    # Small pictures are enlarged pixel by pixel; a large picture that is reduced in this way would be jagged.
    kind = Image.Resampling.NEAREST if image.shape[-1] <= side else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((side, side), kind)


def _shortened(prompt: str, width: int, lines: int = 2) -> str:
    """Break a prompt into lines of `width` pixels and drop the part that does not fit."""
    return "\n".join(textwrap.wrap(prompt, max(8, width // 6), max_lines=lines, placeholder=" …"))


def picture_grid(columns: dict[str, Tensor], prompts: list[str], path: Path, across: int = 1) -> None:
    """Save images (count, 3, h, w) in [0, 1] as one PNG file: per prompt, one image of each named column.

    Each row holds `across` prompts, under a header with the names of the columns. The file is written complete or not
    at all; raises OSError if that fails.
    """
    size = next(iter(columns.values())).shape[-1]
    side = max(96, size // (1 if size < 256 else 2))
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
    with staged(path) as file:
        sheet.save(file, "PNG", optimize=True)


def save_figure(figure: "Figure", path: Path, dpi: int = 110) -> None:
    """Save a figure in the format of the path's ending, complete or not at all. Raises InputError if that fails."""
    try:
        with staged(path) as file:
            figure.savefig(file, dpi=dpi, format=path.suffix[1:].lower() or "png")
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise InputError(f"cannot write {path}: {reason}") from None


def before_after(before: Tensor, after: Tensor, prompts: list[str], path: Path) -> None:
    """Save pairs of images (count, 3, h, w) in [0, 1] with their prompts as PNG, base left and tuned right."""
    picture_grid({"before": before, "after": after}, prompts, path, across=4)


def curves(folder: Path) -> None:
    """Draw all held-out metrics, the training reward, the loss and old_deviation over epochs as curves.png."""
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
    # A computed layout would draw everything twice.
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
    save_figure(figure, folder / "curves.png")
