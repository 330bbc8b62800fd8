"""The miniature world: 64x64 scenes of simple shapes, their captions, and a true aesthetic score.

A scene holds one to three shapes on a plain background. Its caption states the facts (which shapes, which
colours, how many, their relation, the background); vividness, size, place and shade are left free, so that a
generator can be improved without contradicting its prompts. `miniature.checker` reads an image back.
"""

import hashlib
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 64
KINDS = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.92, 0.12, 0.12),
    "yellow": (0.96, 0.80, 0.08),
    "green": (0.10, 0.72, 0.22),
    "blue": (0.12, 0.30, 0.95),
    "purple": (0.76, 0.14, 0.84),
}
SHADES = {"white": (0.84, 1.0), "grey": (0.42, 0.58), "black": (0.0, 0.16)}
RELATIONS = ("above", "below", "left of", "right of")
NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3}


@dataclass(frozen=True)
class Facts:
    """What a caption states: `shapes` is a tuple of (colour, kind); `relation` is of the first to the second."""

    shapes: tuple[tuple[str, str], ...]
    background: str
    relation: str | None = None

    @property
    def statement(self) -> tuple:
        """The same for facts that say the same: shapes without an order have none, "below" is "above" turned round."""
        if self.relation is None:
            return tuple(sorted(self.shapes)), self.background, None
        turned = {"below": "above", "right of": "left of"}.get(self.relation)
        return (self.shapes[::-1] if turned else self.shapes), self.background, turned or self.relation

    @property
    def held_out(self) -> bool:
        """Whether scenes with these facts are kept out of all pretraining (one in ten, by a fixed hash).

        "A above B" and "B below A" are two statements here, so one may be known and the other held out.
        """
        text = f"{sorted(self.shapes) if self.relation is None else self.shapes}|{self.background}|{self.relation}"
        return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


@dataclass(frozen=True)
class Scene:
    """One picture: its facts, its wording, and what the caption leaves open (pixels and 0..1 units)."""

    facts: Facts
    caption: str
    shade: float
    centres: tuple[tuple[float, float], ...]
    radii: tuple[float, ...]
    vividness: tuple[float, ...]


def caption_for(facts: Facts, rng: np.random.Generator) -> str:
    """Word the facts in one of several ways, at most 12 words and commas."""
    ending = [f" on {facts.background}", f", {facts.background} background"][rng.integers(2)]
    names = [f"{colour} {kind}" for colour, kind in facts.shapes]
    article = ["a ", ""][rng.integers(2)]
    if len(set(facts.shapes)) == 1 and len(names) > 1:
        plural = names[0] + ("es" if names[0].endswith("s") else "s")
        return f"{['', '', 'two', 'three'][len(names)]} {plural}{ending}"
    if len(names) == 1:
        leading = [f"{article}{names[0]}{ending}", f"one {names[0]}{ending}"]
        return (leading + [f"a {facts.background} background with a {names[0]}"])[rng.integers(3)]
    if len(names) == 2:
        joint = facts.relation or "and"
        return f"{article}{names[0]} {joint} {article}{names[1]}{ending}"
    joint = [", ", " and "][rng.integers(2)]
    return f"{names[0]}, {names[1]}{joint}{names[2]}{ending}"


def read_caption(caption: str) -> Facts | None:
    """The facts a caption of this world states, or None when it is not such a caption."""
    words = caption.lower()
    pattern = rf"(?:\b({'|'.join(NUMBERS)}) )?\b({'|'.join(COLOURS)}) ({'|'.join(KINDS)})(?:e?s)?\b"
    shapes: list[tuple[str, str]] = []
    for number, colour, kind in re.findall(pattern, words):
        shapes += [(colour, kind)] * NUMBERS.get(number or "a", 1)
    ground = re.search(rf"\bon ({'|'.join(SHADES)})\b|\b({'|'.join(SHADES)}) background", words)
    relation = next((name for name in RELATIONS if f" {name} " in words), None)
    if not shapes or ground is None:
        return None
    return Facts(tuple(shapes), ground.group(1) or ground.group(2), relation)


def _draw_facts(rng: np.random.Generator, shares: tuple[float, float, float]) -> Facts:
    def shape():
        return list(COLOURS)[rng.integers(len(COLOURS))], KINDS[rng.integers(len(KINDS))]

    count = 1 + int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares), side="right"))
    background = list(SHADES)[rng.integers(len(SHADES))]
    if count > 1 and rng.random() < 0.2:
        return Facts((shape(),) * count, background)
    shapes = [shape()]
    while len(shapes) < count:
        candidate = shape()
        if candidate not in shapes:
            shapes.append(candidate)
    relation = RELATIONS[rng.integers(4)] if count == 2 and rng.random() < 0.75 else None
    return Facts(tuple(shapes), background, relation)


def _place(facts: Facts, rng: np.random.Generator) -> tuple[list[tuple[float, float]], list[float]]:
    """Draw centres and radii so that shapes keep 4 px between their radii and 3 px from the border."""
    count = len(facts.shapes)
    low, high = {1: (11.0, 17.0), 2: (10.0, 13.5), 3: (8.5, 10.5)}[count]
    while True:
        radii = rng.uniform(low, high, count)
        centres = [(rng.uniform(r + 3, SIZE - r - 3), rng.uniform(r + 3, SIZE - r - 3)) for r in radii]
        if facts.relation is not None:
            first, second = centres
            vertical = facts.relation in ("above", "below")
            along = (second[1] - first[1]) if vertical else (second[0] - first[0])
            across = abs(second[0] - first[0]) if vertical else abs(second[1] - first[1])
            if facts.relation in ("below", "right of"):
                along = -along
            if along < 12 or along < across + 4:
                continue
        pairs = [(i, j) for i in range(count) for j in range(i)]
        if all(math.dist(centres[i], centres[j]) >= radii[i] + radii[j] + 4 for i, j in pairs):
            return centres, list(radii)


def draw_scene(
    rng: np.random.Generator, held_out: bool = False, shares: tuple[float, float, float] = (0.45, 0.42, 0.13)
) -> Scene:
    """Draw a scene; `held_out` picks the side of the split, `shares` weighs 1, 2 and 3 shapes."""
    facts = _draw_facts(rng, shares)
    while facts.held_out != held_out:
        facts = _draw_facts(rng, shares)
    centres, radii = _place(facts, rng)
    # Shapes of one scene share most of their vividness: one mood for the whole picture.
    mood = rng.uniform(0.45, 1.0)
    vividness = np.clip(mood + rng.uniform(-0.08, 0.08, len(radii)), 0.42, 1.0)
    shade = rng.uniform(*SHADES[facts.background])
    return Scene(facts, caption_for(facts, rng), shade, tuple(centres), tuple(radii), tuple(vividness))


def draw_scenes(count: int, seed: int, held_out: bool = False, **options) -> list[Scene]:
    """Draw `count` scenes from one seed."""
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, held_out, **options) for _ in range(count)]


def alter(scene: Scene, rng: np.random.Generator, held_out: bool | None = None) -> Scene:
    """The same scene but for one fact: a colour, a kind, the background, two shapes exchanged, or one shape fewer.

    Size, place and vividness stay as they are. `held_out` picks the side of the split, None takes either.
    """
    facts, keep = scene.facts, list(range(len(scene.radii)))
    while facts.statement == scene.facts.statement or (held_out is not None and facts.held_out != held_out):
        shapes, keep = list(scene.facts.shapes), list(range(len(scene.radii)))
        background, relation = scene.facts.background, scene.facts.relation
        changed, slot = rng.integers(5), rng.integers(len(shapes))
        if changed == 0:
            shapes[slot] = (list(COLOURS)[rng.integers(len(COLOURS))], shapes[slot][1])
        elif changed == 1:
            shapes[slot] = (shapes[slot][0], KINDS[rng.integers(len(KINDS))])
        elif changed == 2:
            background = list(SHADES)[rng.integers(len(SHADES))]
        elif changed == 3:
            shapes = shapes[::-1]
        elif len(shapes) > 1:
            keep.pop(slot)
            shapes, relation = [shapes[index] for index in keep], None
        alike = len(set(shapes)) == 1  # "two red circles" states no relation
        facts = Facts(tuple(shapes), background, None if alike else relation)
    shade = scene.shade if facts.background == scene.facts.background else rng.uniform(*SHADES[facts.background])
    centres = tuple(scene.centres[index] for index in keep)
    radii = tuple(scene.radii[index] for index in keep)
    vividness = tuple(scene.vividness[index] for index in keep)
    return Scene(facts, caption_for(facts, rng), shade, centres, radii, vividness)


def _signed_distance(kind: str, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Distance in pixels to the outline of a shape of radius r at the origin, negative inside (y points down)."""
    if kind == "circle":
        return torch.hypot(x, y) - 0.95 * r
    if kind == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.8 * r
    if kind == "triangle":
        slope = 0.92 / 1.68  # half the base over the height
        side = (x.abs() - slope * (y + r)) / math.hypot(1, slope)
        return torch.maximum(side, y - 0.68 * r)
    across, along = 0.34 * r, 0.98 * r
    wide = torch.maximum(x.abs() - along, y.abs() - across)
    tall = torch.maximum(x.abs() - across, y.abs() - along)
    return torch.minimum(wide, tall)


def coverage(kind: str, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Antialiased share of each pixel that the shape covers, in [0, 1]."""
    return (0.5 - _signed_distance(kind, x, y, r)).clamp(0, 1)


def _rgb(colour: str, vividness: float) -> torch.Tensor:
    pure = torch.tensor(COLOURS[colour])
    return vividness * pure + (1 - vividness) * pure.mean()


def render(scenes: list[Scene]) -> torch.Tensor:
    """Render scenes to (len(scenes), 3, 64, 64) float32 in [0, 1]."""
    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    images = torch.tensor([s.shade for s in scenes], dtype=torch.float32).view(-1, 1, 1, 1).repeat(1, 3, SIZE, SIZE)
    for slot in range(max(len(s.radii) for s in scenes)):
        for kind in KINDS:
            chosen = [n for n, s in enumerate(scenes) if slot < len(s.radii) and s.facts.shapes[slot][1] == kind]
            if not chosen:
                continue
            centre = torch.tensor([scenes[n].centres[slot] for n in chosen], dtype=torch.float32)
            radius = torch.tensor([scenes[n].radii[slot] for n in chosen], dtype=torch.float32).view(-1, 1, 1)
            colour = torch.stack(
                [_rgb(scenes[n].facts.shapes[slot][0], float(scenes[n].vividness[slot])) for n in chosen]
            )
            x = axis.view(1, 1, -1) - centre[:, 0].view(-1, 1, 1)
            y = axis.view(1, -1, 1) - centre[:, 1].view(-1, 1, 1)
            share = coverage(kind, x.expand(-1, SIZE, -1), y.expand(-1, -1, SIZE), radius)[:, None]
            images[chosen] = images[chosen] * (1 - share) + colour[:, :, None, None] * share
    return images


def border_colour(images: torch.Tensor) -> torch.Tensor:
    """Median colour of the outer two pixels, (batch, 3, 1, 1): what stands for the background."""
    frame = torch.ones(images.shape[-2:], dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    return images[:, :, frame].median(dim=2).values[:, :, None, None]


def true_aesthetic(images: torch.Tensor) -> torch.Tensor:
    """Return the world's true aesthetic score, (batch,) float32 in 1..10, computed from pixels in [0, 1].

    Likes vivid shapes (.4), strong contrast to the background (.2), a composition whose centre of mass is the
    picture's (.25) and a quarter of the picture covered (.15). A blank, grainy or wholly covered picture has no
    shapes or no ground and scores low.
    """
    images = images.float().clamp(0, 1)
    smooth = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    grain = (images - smooth).abs().mean((1, 2, 3))
    distance = (smooth - border_colour(smooth)).square().mean(1).sqrt()
    mask = torch.sigmoid((distance - 0.12) / 0.012)
    area = mask.mean((1, 2))
    present = area.square() / (area.square() + 0.02**2)
    weight = mask.sum((1, 2)) + 1.0
    chroma = ((smooth.amax(1) - smooth.amin(1)) * mask).sum((1, 2)) / weight
    contrast = (distance * mask).sum((1, 2)) / weight
    axis = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    off_x = (mask * axis[None, None, :]).sum((1, 2)) / weight
    off_y = (mask * axis[None, :, None]).sum((1, 2)) / weight
    balance = torch.exp(-(off_x.square() + off_y.square()) / (2 * 0.22**2))
    filling = torch.exp(-((area - 0.25) ** 2) / (2 * 0.10**2))
    crowded = torch.exp(-((area - 0.25).clamp_min(0) ** 2) / (2 * 0.25**2))
    liked = 0.4 * (chroma / 0.75) + 0.2 * (contrast / 0.6) + 0.25 * balance + 0.15 * filling
    return 1 + 9 * (liked * present * crowded * torch.exp(-((grain / 0.1) ** 2))).clamp(0, 1)


def distinct_captions(count: int, seed: int, held_out: bool) -> list[str]:
    """`count` captions of one and two shapes, no two alike."""
    captions: dict[str, None] = {}
    rng = np.random.default_rng(seed)
    while len(captions) < count:
        captions[draw_scene(rng, held_out, shares=(0.5, 0.5, 0.0)).caption] = None
    return list(captions)
