"""Clean latents and reward targets of all images, computed once and kept on disk."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stitchvm_reward.errors import InputError
from stitchvm_reward.files import staged
from stitchvm_reward.rewards.clip import ImageTower
from stitchvm_reward.stitching.generate import GeneratedImages
from stitchvm_reward.stitching.images import ImageSet

SHARD = 256
NAMES = ("latents", "embedding", "states")
Images = ImageSet | GeneratedImages


class TeacherCache:
    """Latents (channels, h, w), reward embeddings (width,) and last states (tokens, width) of the readable images.

    `rows` are positions in the image set, so the address of a target does not depend on which other images are broken.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = sorted(folder.glob("shard-*.safetensors"))
        self.rows: list[int] = []
        self.broken: list[str] = []
        self._place: list[tuple[int, int]] = []
        self._opened: dict[int, safe_open] = {}
        for number, path in enumerate(self.files):
            with safe_open(path, framework="pt") as file:
                rows = file.get_tensor("rows").tolist()
                self.broken += json.loads(file.metadata()["broken"])
            self.rows += rows
            self._place += [(number, place) for place in range(len(rows))]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Iterable[int], names: Iterable[str] = NAMES) -> list[Tensor]:
        """Return the named tensors of some images, each (len(indices), ...) float32."""
        places = [self._place[index] for index in indices]
        return [torch.stack([self._row(name, *place) for place in places]).float() for name in names]

    def _row(self, name: str, number: int, place: int) -> Tensor:
        if number not in self._opened:
            self._opened[number] = safe_open(self.files[number], framework="pt").__enter__()
        return self._opened[number].get_slice(name)[place]


def teacher_folder(cache: str, images: Images, identity: dict) -> Path:
    """Return the folder of the targets of these images; `identity` describes autoencoder, reward and image size."""
    text = json.dumps({"images": images.key} | identity, sort_keys=True)
    return Path(cache).expanduser() / hashlib.sha256(text.encode()).hexdigest()[:32]


def shard_count(images: Images) -> int:
    """Return the number of shards that the targets of these images fill."""
    return -(-len(images) // SHARD)


@torch.no_grad()
def compute(
    folder: Path,
    images: Images,
    shards: Iterable[int],
    *,
    side: int,
    micro_batch: int,
    encode: Callable[[list[int], Tensor], Tensor],
    tower: ImageTower,
) -> None:
    """Write those of `shards` that are missing; each holds SHARD images of the set and is written whole or not at all.

    `encode(indices, images)` returns the clean latents of some images of the set, (batch, 3, side, side).
    """
    for number in shards:
        path = folder / f"shard-{number:06d}.safetensors"
        if path.exists():
            continue
        indices = range(number * SHARD, min((number + 1) * SHARD, len(images)))
        good: list[int] = []
        parts: dict[str, list[Tensor]] = {name: [] for name in NAMES}
        for start in range(0, len(indices), micro_batch):
            loaded = {index: images.load(index, side) for index in indices[start : start + micro_batch]}
            readable = {index: image for index, image in loaded.items() if image is not None}
            if not readable:
                continue
            batch = torch.stack(list(readable.values()))
            states, embedding = tower.states_and_embedding(batch)
            for name, value in zip(NAMES, (encode(list(readable), batch), embedding, states), strict=True):
                parts[name].append(value.cpu())
            good += readable
        broken = [images.names[index] for index in sorted(set(indices) - set(good))]
        tensors = {name: torch.cat(values).contiguous() for name, values in parts.items() if values}
        # Half precision stores states and latents to one part in 2,000. Embeddings are small and stay float32.
        tensors = {name: t if name == "embedding" else t.half() for name, t in tensors.items()}
        tensors["rows"] = torch.tensor(good, dtype=torch.int64)
        with staged(path) as file:
            save_file(tensors, file, metadata={"broken": json.dumps(broken)})


def open_teacher_cache(folder: Path, images: Images, needed: int) -> TeacherCache:
    """Open the finished targets. Raises InputError if fewer than `needed` images are readable."""
    targets = TeacherCache(folder)
    if len(targets) < needed:
        shown = ", ".join(targets.broken[:3]) or "none broken"
        raise InputError(
            f"{len(targets)} of {len(images)} images can be read ({shown}), {needed} or more are needed: "
            "the held-out ones, the search's and one batch; add images or lower data.held_out, search.probe"
        )
    return targets
