"""The head of a diffusion backbone: its first blocks, run alone, from a noisy latent to image tokens on their grid.

Another family of transformers is another file with the same three functions' worth: load, width, features.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stitchvm_reward.diffusion.generator import Conditions
from stitchvm_reward.errors import InputError
from stitchvm_reward.hub import locate

SIGNATURE = 16  # numbers kept of each of a few weights, to know a network again whatever its number format


@dataclass(frozen=True)
class HalfPass:
    """A forward pass of `network` that stands after its first `blocks` blocks, to be gone on with or left.

    `text` (batch, length, width), `image` (batch, tokens, width) on a grid of `grid` tokens, `time` (batch, width).
    After the last block there is no text.
    """

    network: Any
    blocks: int
    grid: tuple[int, int]
    text: Tensor | None
    image: Tensor
    time: Tensor

    def features(self) -> Tensor:
        """The image tokens on their grid, (batch, width, height, width)."""
        return self.image.transpose(1, 2).unflatten(2, self.grid)

    def select(self, rows: Tensor | slice) -> "HalfPass":
        """The pass of some samples, repeated as often as they are named."""
        text = None if self.text is None else self.text[rows]
        return replace(self, text=text, image=self.image[rows], time=self.time[rows])

    def detach(self) -> "HalfPass":
        """The same without gradient."""
        text = None if self.text is None else self.text.detach()
        return replace(self, text=text, image=self.image.detach(), time=self.time.detach())

    def finish(self) -> Tensor:
        """Run the blocks that are left: the velocity (batch, channels, height, width) of the whole network."""
        network, text, image = self.network, self.text, self.image
        for block in network.transformer_blocks[self.blocks :]:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=self.time)
        patches = network.proj_out(network.norm_out(image, self.time))
        patch, (rows, columns) = network.config.patch_size, self.grid
        patches = patches.view(len(image), rows, columns, patch, patch, network.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(image), -1, rows * patch, columns * patch)


def join_passes(parts: list[HalfPass]) -> HalfPass:
    """The passes of several batches as one."""
    texts = [part.text for part in parts if part.text is not None]
    image, time = torch.cat([part.image for part in parts]), torch.cat([part.time for part in parts])
    return replace(parts[0], text=torch.cat(texts) if texts else None, image=image, time=time)


class BackboneHead:
    """The first `blocks` blocks of a frozen Stable Diffusion 3 transformer; no block after the last asked for is run.

    It holds a reference to the network, not a copy, and is no module: nothing of it is trained, saved or sharded.
    Block number i is counted from 1; number 0 is the latent itself, which the raw-latent baseline is stitched to.
    """

    def __init__(self, transformer: Any, blocks: int | None = None):
        self.network = transformer
        self.blocks = len(transformer.transformer_blocks) if blocks is None else blocks
        if not 0 <= self.blocks <= len(transformer.transformer_blocks):
            raise InputError(
                f"the backbone has {len(transformer.transformer_blocks)} blocks, {blocks} of them were asked for"
            )
        self.device, self.dtype = transformer.device, transformer.dtype
        self.channels = int(transformer.config.in_channels)
        self.patch = int(transformer.config.patch_size)

    def width(self, block: int) -> int:
        """Channels of the features after a block."""
        return self.network.inner_dim if block else self.channels

    def features(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, blocks: Iterable[int]
    ) -> dict[int, Tensor]:
        """Features (batch, width, height, width) after each of `blocks`, in the network's dtype, in one pass.

        As `run` otherwise.
        """
        return self.run(latents, sigma, conditions, blocks)[0]

    def run(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, blocks: Iterable[int]
    ) -> tuple[dict[int, Tensor], HalfPass | None]:
        """The features after each of `blocks`, and the pass as it stands after the last of them (None after block 0).

        `latents` (batch, channels, height, width) at levels `sigma` (batch,) in [0, 1], which the network is told
        as its timestep. Differentiable in the latents. Raises ValueError for a block that is not there.
        """
        wanted = set(blocks)
        if not wanted or min(wanted) < 0 or max(wanted) > self.blocks:
            raise ValueError(f"blocks must be from 0 to {self.blocks}, got {sorted(wanted)}")
        latents = latents.to(self.dtype)
        found = {0: latents} if 0 in wanted else {}
        if not max(wanted):
            return found, None
        network, (height, width) = self.network, latents.shape[-2:]
        image = network.pos_embed(latents).contiguous()
        time = network.time_text_embed(sigma.to(latents.device, torch.float32) * 1000, conditions.pooled.to(self.dtype))
        text = network.context_embedder(conditions.tokens.to(self.dtype))
        grid = (height // self.patch, width // self.patch)
        for number, block in enumerate(network.transformer_blocks[: max(wanted)], start=1):
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
            stands = HalfPass(network, number, grid, text, image, time)
            if number in wanted:
                found[number] = stands.features()
        return found, stands

    def signature(self, blocks: int) -> list[float]:
        """Some numbers out of the weights that `blocks` blocks use."""
        modules: list[Any] = [self.network.pos_embed.proj]
        modules += [block.attn.to_q for block in self.network.transformer_blocks[:blocks]]
        weights = [getattr(module, "base_layer", module).weight for module in modules]  # beneath an adapter
        return [float(value) for weight in weights for value in weight.detach().flatten()[:SIGNATURE].float().cpu()]


def _weight_files(folder: Path) -> dict[str, Path]:
    """Which file of a transformer folder holds which tensor."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "diffusion_pytorch_model.safetensors"
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def read_weights(folder: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a transformer folder by name, one at a time and in the number format they are stored in.

    Raises OSError, KeyError or SafetensorError for a file that is missing, lacks a tensor or is damaged.
    """
    files = _weight_files(folder)
    for path in dict.fromkeys(files[name] for name in names):
        with safe_open(path, framework="pt") as file:
            for name in (name for name in names if files[name] == path):
                yield name, file.get_tensor(name)


def load_backbone(model: str, blocks: int, dtype: torch.dtype, device: torch.device) -> BackboneHead:
    """Load the first `blocks` blocks of a Stable Diffusion 3 folder or hub id; the others' weights are not read.

    Raises InputError where the model is missing, of another kind, or has fewer blocks.
    """
    folder = locate(model, ("transformer/*",)) / "transformer"
    try:
        config = SD3Transformer2DModel.load_config(folder)
        if config.get("_class_name") != "SD3Transformer2DModel":
            raise InputError(f"{model} is a {config.get('_class_name')}; a backbone must be an SD3Transformer2DModel")
        with torch.device("meta"):
            network = SD3Transformer2DModel.from_config(config)
        if blocks > len(network.transformer_blocks):
            raise InputError(f"{model} has {len(network.transformer_blocks)} blocks, {blocks} of them were asked for")
        network.transformer_blocks = nn.ModuleList(network.transformer_blocks[:blocks])
        network.norm_out, network.proj_out = nn.Identity(), nn.Identity()
        tensors = {name: tensor.to(dtype) for name, tensor in read_weights(folder, list(network.state_dict()))}
        network.load_state_dict(tensors, assign=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{model} is no Stable Diffusion 3 pipeline folder: {reason}") from None
    return BackboneHead(network.to(device).eval().requires_grad_(False))
