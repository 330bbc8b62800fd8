"""Read a picture of the miniature world back: which shapes, which colours, how many, where, on what background.

The exact checker is to this world what GenEval is to a large one: a strict yes or no against the caption, and
the share of the caption's facts that hold.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from miniature import scenes
from miniature.scenes import COLOURS, KINDS, Facts

SMALLEST = 24  # pixels; specks below this are not shapes
CANVAS = 24  # side of the normalised picture of one shape
ALIKE = 0.74  # overlap with a template from which a blob counts as that kind


@dataclass(frozen=True)
class Blob:
    """One connected patch of one colour: what it most resembles, how well (IoU), its centre and area in pixels."""

    colour: str
    kind: str
    likeness: float
    x: float
    y: float
    area: int

    @property
    def recognised(self) -> bool:
        return self.likeness >= ALIKE


@dataclass(frozen=True)
class Reading:
    """What the checker saw in one image; `background` is None when it is not one of the world's."""

    blobs: tuple[Blob, ...]
    background: str | None


def _hues(rgb: torch.Tensor) -> torch.Tensor:
    """Hue in degrees of (..., 3) colours."""
    r, g, b = rgb.unbind(-1)
    return torch.rad2deg(torch.atan2(3**0.5 * (g - b), 2 * r - g - b)) % 360


def _colour_map(images: torch.Tensor) -> torch.Tensor:
    """(batch, height, width) index into COLOURS of every coloured pixel, -1 elsewhere."""
    pixels = images.permute(0, 2, 3, 1)
    named = _hues(torch.tensor(list(COLOURS.values())))
    gap = (_hues(pixels)[..., None] - named + 180) % 360 - 180
    coloured = (images.amax(1) - images.amin(1)) > 0.15
    return torch.where(coloured, gap.abs().argmin(-1), -1)


def _normalise(masks: torch.Tensor) -> torch.Tensor:
    """Move the centre of mass of (n, h, w) masks to the middle and scale them to one area, (n, CANVAS, CANVAS)."""
    height, width = masks.shape[-2:]
    ys, xs = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    area = masks.sum((1, 2)).clamp_min(1)
    cx, cy = (masks * xs).sum((1, 2)) / area, (masks * ys[:, None]).sum((1, 2)) / area
    reach = area.sqrt() * 0.95  # half the side of the window: the cross, the widest kind, just fits
    steps = (torch.arange(CANVAS) + 0.5) / CANVAS * 2 - 1
    grid_x = (cx[:, None] + reach[:, None] * steps) / width * 2 - 1
    grid_y = (cy[:, None] + reach[:, None] * steps) / height * 2 - 1
    grid = torch.stack([grid_x[:, None, :].expand(-1, CANVAS, -1), grid_y[:, :, None].expand(-1, -1, CANVAS)], dim=-1)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def _templates() -> torch.Tensor:
    axis = torch.arange(scenes.SIZE) + 0.5 - scenes.SIZE / 2
    x, y = axis.expand(scenes.SIZE, -1), axis[:, None].expand(-1, scenes.SIZE)
    return _normalise(torch.stack([scenes.coverage(kind, x, y, torch.tensor(14.0)) for kind in KINDS]))


def read(images: torch.Tensor) -> list[Reading]:
    """Read (batch, 3, 64, 64) images in [0, 1]."""
    images = images.float().cpu().clamp(0, 1)
    colours = _colour_map(images)
    patches = []
    for index, picture in enumerate(colours.numpy()):
        for colour in np.unique(picture[picture >= 0]):
            labels, count = ndimage.label(picture == colour)
            areas = np.bincount(labels.ravel())
            kept = [label for label in range(1, count + 1) if areas[label] >= SMALLEST]
            patches += [(index, colour, torch.from_numpy(labels == label)) for label in kept]
    blobs: list[list[Blob]] = [[] for _ in images]
    if patches:
        masks = torch.stack([mask for *_, mask in patches]).float()
        shapes, templates = _normalise(masks)[:, None], _templates()[None]
        overlap = torch.minimum(shapes, templates).sum((2, 3)) / torch.maximum(shapes, templates).sum((2, 3))
        likeness, kinds = overlap.max(1)
        for (index, colour, mask), best, kind in zip(patches, likeness.tolist(), kinds.tolist()):
            y, x = (coordinates.float().mean().item() + 0.5 for coordinates in mask.nonzero(as_tuple=True))
            blobs[index].append(Blob(list(COLOURS)[colour], KINDS[kind], best, x, y, int(mask.sum())))
    grounds = scenes.border_colour(images)[:, :, 0, 0]
    return [Reading(tuple(b), _background(g)) for b, g in zip(blobs, grounds)]


def _background(colour: torch.Tensor) -> str | None:
    if float(colour.max() - colour.min()) > 0.15:
        return None
    middle = float(colour.mean())
    return "white" if middle > 0.71 else "black" if middle < 0.29 else "grey"


def relation_holds(relation: str, first: Blob, second: Blob) -> bool:
    """Whether `first` stands in `relation` to `second`: 6 px or more along the axis, and more along than across."""
    dx, dy = second.x - first.x, second.y - first.y
    along, across = (dy, dx) if relation in ("above", "below") else (dx, dy)
    along = -along if relation in ("below", "right of") else along
    return along >= 6 and along > abs(across)


def _facts_held(facts: Facts, blobs: tuple[Blob, ...]) -> list[bool]:
    """Which facts hold when the caption's shapes are matched with these blobs in this order."""
    held = []
    for (colour, kind), blob in itertools.zip_longest(facts.shapes, blobs[: len(facts.shapes)]):
        held += [blob is not None and blob.colour == colour]
        held += [blob is not None and blob.kind == kind and blob.recognised]
    if facts.relation is not None:
        held += [len(blobs) >= 2 and relation_holds(facts.relation, blobs[0], blobs[1])]
    return held


def check(facts: Facts, reading: Reading) -> tuple[bool, float]:
    """Compare a reading with a caption's facts: (all hold and nothing else is there, share that hold)."""
    largest = sorted(reading.blobs, key=lambda blob: -blob.area)[:4]
    size = min(len(facts.shapes), len(largest))
    orders = itertools.permutations(largest, size)
    best = max((_facts_held(facts, order) for order in orders), key=sum)
    held = best + [len(reading.blobs) == len(facts.shapes), reading.background == facts.background]
    return all(held), sum(held) / len(held)


def check_captions(captions: list[str], images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Strict accuracy (0 or 1) and graded share of facts for each image, both (batch,) float32.

    Raises ValueError for a caption that states no facts of this world.
    """
    results = []
    for caption, reading in zip(captions, read(images), strict=True):
        facts = scenes.read_caption(caption)
        if facts is None:
            raise ValueError(f"not a caption of the miniature world: {caption!r}")
        results.append(check(facts, reading))
    strict, graded = zip(*results, strict=True)
    return torch.tensor(strict, dtype=torch.float32), torch.tensor(graded)
