"""The head of a diffusion backbone: its first blocks, run alone, from a noisy latent to image tokens on their grid."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stitchvm_reward.diffusion.generator import Generator, chosen_guidance
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import family_of
from stitchvm_reward.families.family import Conditions, Family, PartialForward
from stitchvm_reward.files import check_name
from stitchvm_reward.hub import locate

SIGNATURE = 16  # numbers kept of each of a few weights, which identify a network in any number format


class BackboneHead:
    """The first `blocks` blocks of a frozen transformer (default: all); no block after the last requested one is run.

    It refers to the network without a copy and is not a module: nothing of it is trained, saved or sharded. Blocks
    are counted from 1. Number 0 is the latent itself, which the raw-latent baseline is stitched to. `guidance` is the
    embedded guidance scale, None for models without.
    """

    def __init__(self, family: Family, transformer: Any, blocks: int | None = None, guidance: float | None = None):
        self.family, self.network, self.guidance = family, transformer, guidance
        depth = len(family.blocks(transformer))
        self.blocks = depth if blocks is None else blocks
        if not 0 <= self.blocks <= depth:
            raise InputError(f"the backbone has {depth} blocks, {blocks} were requested")
        self.device, self.dtype = transformer.device, transformer.dtype

    @classmethod
    def of(cls, generator: Generator) -> "BackboneHead":
        """Return all blocks of a generator's transformer."""
        return cls(generator.family, generator.transformer, guidance=generator.guidance)

    def width(self, block: int, channels: int) -> int:
        """Return the channels of the features after a block; the latents have `channels`."""
        return self.family.width(self.network) if block else channels

    def features(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, blocks: Iterable[int]
    ) -> dict[int, Tensor]:
        """Return features (batch, width, rows, columns) after each of `blocks`, in one pass; see `run`."""
        return self.run(latents, sigma, conditions, blocks)[0]

    def run(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, blocks: Iterable[int]
    ) -> tuple[dict[int, Tensor], PartialForward | None]:
        """Return the features after each of `blocks`, in the network's dtype, and the pass after the last of them.

        `latents` (batch, channels, height, width) are at levels `sigma` (batch,) in [0, 1], which the network is given
        as its timestep. Differentiable in the latents. The pass is None after block 0. Raises ValueError for a block
        that does not exist.
        """
        wanted = sorted(set(blocks))
        if not wanted or wanted[0] < 0 or wanted[-1] > self.blocks:
            raise ValueError(f"blocks must be from 0 to {self.blocks}, got {wanted}")
        latents = latents.to(self.dtype)
        features = {0: latents} if wanted[0] == 0 else {}
        if wanted[-1] == 0:
            return features, None
        level = sigma.to(latents.device, torch.float32)
        state = self.family.embed(self.network, latents, level, conditions, self.guidance)
        for block in [number for number in wanted if number > 0]:
            state = state.run_to(block)
            features[block] = state.features()
        return features, state

    def signature(self, blocks: int) -> list[float]:
        """Return some numbers from the weights that `blocks` blocks use."""
        modules = [self.family.patch_embedding(self.network)]
        modules += [block.attn.to_q for block in self.family.blocks(self.network)[:blocks]]
        weights = [getattr(module, "base_layer", module).weight for module in modules]  # beneath an adapter
        return [float(value) for weight in weights for value in weight.detach().flatten()[:SIGNATURE].float().cpu()]


def _weight_files(folder: Path) -> dict[str, Path]:
    """Return which file of a transformer folder holds which tensor."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"]
        for file in set(files.values()):
            check_name(f"a file named in {index}", file)
        return {name: folder / file for name, file in files.items()}
    single = folder / "diffusion_pytorch_model.safetensors"
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def read_weights(folder: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of a transformer folder by name, one at a time, in the number format they are stored in.

    Raises OSError, KeyError or SafetensorError for a file that is missing, lacks a tensor or is damaged.
    """
    files = _weight_files(folder)
    for path in dict.fromkeys(files[name] for name in names):
        with safe_open(path, framework="pt") as file:
            for name in (name for name in names if files[name] == path):
                yield name, file.get_tensor(name)


def empty_transformer(family: Family, folder: Path, model: str) -> Any:
    """Return the transformer that a folder's configuration describes, on the meta device.

    Raises InputError where it is of another class than the family's, and OSError or ValueError where it is unreadable.
    """
    config = family.transformer.load_config(folder)
    expected = family.transformer.__name__
    if config.get("_class_name") != expected:
        raise InputError(f"the transformer of {model} is a {config.get('_class_name')}, it must be a {expected}")
    with torch.device("meta"):
        return family.transformer.from_config(config)


def load_backbone(
    model: str, blocks: int, dtype: torch.dtype, device: torch.device, guidance: float | None = None
) -> BackboneHead:
    """Load the first `blocks` blocks of a folder or hub id; the weights of the other blocks are not read.

    Raises InputError where the model is missing, of an unknown family, or has fewer blocks.
    """
    family = family_of(model)
    folder = locate(model, ("transformer/*",)) / "transformer"
    try:
        network = empty_transformer(family, folder, model)
        depth = len(family.blocks(network))
        if blocks > depth:
            raise InputError(f"{model} has {depth} blocks, {blocks} were requested")
        family.truncate(network, blocks)
        tensors = {name: tensor.to(dtype) for name, tensor in read_weights(folder, list(network.state_dict()))}
        network.load_state_dict(tensors, assign=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{model} is not a complete {family.name} pipeline folder: {reason}") from None
    chosen = chosen_guidance(family, network.config, guidance, model)
    return BackboneHead(family, network.to(device).eval().requires_grad_(False), guidance=chosen)
