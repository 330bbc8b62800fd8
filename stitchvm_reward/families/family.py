"""What a model family offers to the rest of the code; every family is one module beside this one."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from stitchvm_reward.errors import InputError

AUTOENCODER_KL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@dataclass(frozen=True)
class Conditions:
    """What a network reads of a batch of prompts: named tensors, each (batch, ...).

    The names are the family's own.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Conditions":
        return Conditions({name: function(tensor) for name, tensor in self.tensors.items()})

    def expand(self, count: int) -> "Conditions":
        """Return the conditions of one prompt for `count` samples, without a copy."""
        return self._map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def select(self, rows: Tensor) -> "Conditions":
        """Return the conditions of some rows, which may be repeated."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Conditions":
        """Return the conditions on another device, floating-point tensors in `dtype` where it is given."""
        return self._map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def key(self) -> tuple:
        """Return the names and shapes of one prompt's tensors."""
        return tuple((name, tuple(tensor.shape[1:])) for name, tensor in sorted(self.tensors.items()))


@dataclass(frozen=True)
class Architecture:
    """A model's configurations, known without its weights: of a folder, or as published under a hub id.

    `text_encoders` are configurations in the order of the pipeline's parts. `clip_tokens` is the length of CLIP's
    text. `text_parameters` counts the published text encoders' parameters and is 0 for a folder.
    """

    family: "Family"
    name: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    text_encoders: tuple[Mapping[str, Any], ...]
    clip_tokens: int
    text_parameters: int = 0

    @property
    def latent_factor(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return (channels, height, width) of the latents of square images with sides of `resolution` pixels."""
        side = resolution // self.latent_factor
        return int(self.vae["latent_channels"]), side, side


@dataclass(frozen=True)
class Published:
    """A model of a family as it is published: its configurations, and what its licence is called."""

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    modelspec: str
    license_name: str
    comfyui_workflow: str | None = None


@dataclass(frozen=True)
class PartialForward:
    """A forward pass of `network` that has run its first `blocks` blocks and can be finished or dropped.

    `text` (batch, length, width) is None after the last block of some families, `image` is (batch, tokens, width) on
    a `grid` of tokens and `time` (batch, width). `shared` holds what all samples have in common, such as positions;
    `guidance` is the embedded guidance scale.
    """

    family: "Family"
    network: Any
    grid: tuple[int, int]
    text: Tensor | None
    image: Tensor
    time: Tensor
    blocks: int = 0
    shared: Any = None
    guidance: float | None = None

    def features(self) -> Tensor:
        """Return the image tokens on their grid, (batch, width, rows, columns)."""
        return self.image.transpose(1, 2).unflatten(2, self.grid)

    def select(self, rows: Tensor | slice) -> "PartialForward":
        """Return the pass of some samples, which may be repeated."""
        text = None if self.text is None else self.text[rows]
        return replace(self, text=text, image=self.image[rows], time=self.time[rows])

    def detach(self) -> "PartialForward":
        """Return the pass without gradient."""
        text = None if self.text is None else self.text.detach()
        return replace(self, text=text, image=self.image.detach(), time=self.time.detach())

    def run_to(self, block: int) -> "PartialForward":
        """Run the blocks up to number `block`, counted from 1."""
        text, image = self.text, self.image
        for layer in self.family.blocks(self.network)[self.blocks : block]:
            text, image = self.family.run_block(layer, replace(self, text=text, image=image))
        return replace(self, text=text, image=image, blocks=block)

    def finish(self) -> Tensor:
        """Run the remaining blocks: the velocity (batch, channels, height, width) of the whole network."""
        return self.family.finish(self.run_to(len(self.family.blocks(self.network))))


def join_passes(parts: list[PartialForward]) -> PartialForward:
    """Return the passes of several batches as one."""
    texts = [part.text for part in parts if part.text is not None]
    image, time = torch.cat([part.image for part in parts]), torch.cat([part.time for part in parts])
    return replace(parts[0], text=torch.cat(texts) if texts else None, image=image, time=time)


class Family(ABC):
    """One family of models: every fact and every operation that differs between families.

    Latents are (batch, channels, height, width) everywhere outside, whatever a network packs them into. Levels
    `sigma` in [0, 1] are (batch,). `guidance` is the scale that a guidance-distilled network is given as an input;
    it is None for every other network. Blocks are numbered from 1 across all kinds of blocks; number 0 is the latent.
    """

    name: str
    pipeline: Any
    transformer: Any
    autoencoder: Any = AutoencoderKL
    text_parts: tuple[str, ...]
    condition_names: tuple[str, ...]
    """Names of the tensors that the network reads of a prompt."""
    text_length: int
    """Text tokens that the family's pipeline reads by default."""
    guidance: float | None = None
    """Default of the embedded guidance scale; None where networks of the family have no such input."""
    steering_guidance: float
    """Guidance scale that published samples of the family use."""
    resolution_multiple: int = 16
    lora_targets: tuple[str, ...]
    lora_prefix: str = "transformer."
    tag: str
    published: Mapping[str, Published]
    published_text: tuple[Mapping[str, Any], ...]
    published_text_parameters: int
    published_clip_tokens: int

    # Configurations

    def architecture(self, model: str) -> Architecture:
        """Return the configurations of a folder or a published hub id. Raises InputError for anything else."""
        folder = Path(model).expanduser()
        if not folder.is_dir():
            if model not in self.published:
                raise InputError(f"{model} is not a published {self.name} model; known: {', '.join(self.published)}")
            shapes = self.published[model]
            return Architecture(
                self,
                model,
                shapes.transformer,
                shapes.vae,
                FlowMatchEulerDiscreteScheduler.from_config(dict(shapes.scheduler)).config,
                self.published_text,
                self.published_clip_tokens,
                self.published_text_parameters,
            )
        encoders = tuple(part for part in self.text_parts if part.startswith("text_encoder"))
        files = ["transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
        files += ["tokenizer/tokenizer_config.json", *(f"{part}/config.json" for part in encoders)]
        try:
            transformer, vae, scheduler, tokenizer, *texts = (json.loads((folder / file).read_text()) for file in files)
            tokens = int(tokenizer["model_max_length"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder} is not a complete {self.name} pipeline folder: {error}") from None
        complete = FlowMatchEulerDiscreteScheduler.from_config(scheduler).config  # with the defaults of missing keys
        return Architecture(self, model, transformer, vae, complete, tuple(texts), tokens)

    def published_as(self, config: Mapping[str, Any]) -> str | None:
        """Return the hub id of the published model whose transformer has the shape of `config`, or None."""

        def plain(value: Any) -> Any:
            return list(value) if isinstance(value, tuple) else value

        for name, model in self.published.items():
            if all(plain(config.get(key)) == plain(value) for key, value in model.transformer.items()):
                return name
        return None

    def embeds_guidance(self, config: Mapping[str, Any]) -> bool:
        """Return whether a transformer of this configuration reads a guidance scale."""
        return False

    @abstractmethod
    def schedule(self, config: Mapping[str, Any], steps: int, latent_shape: tuple[int, ...]) -> list[float]:
        """Return `steps` noise levels from 1 downward and then 0, for latents of this shape.

        `config` is the scheduler's configuration.
        """

    @abstractmethod
    def sequence(self, architecture: Architecture, resolution: int, text_length: int) -> tuple[int, int]:
        """Return the number of tokens that a block works on, text and image together, and their width."""

    @abstractmethod
    def stand_in(self, architecture: Architecture, count: int, text_length: int) -> Conditions:
        """Return conditions of zeros for `count` prompts, on the default device."""

    @abstractmethod
    def text_modules(self, architecture: Architecture, text_length: int) -> list[tuple[nn.Module, int]]:
        """Return text encoders without their weights, and how many tokens each reads."""

    # Text

    @abstractmethod
    def encode(self, pipeline: Any, texts: list[str], text_length: int) -> dict[str, Tensor]:
        """Return named tensors (len(texts), ...) on the pipeline's device: what the network reads of the texts."""

    def kept(self, architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what has to be stored of encoded prompts (batch, ...) so that `restored` returns all of it."""
        return dict(tensors)

    def restored(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of which `kept` has left something out, bit for bit."""
        return dict(kept)

    # The network

    @abstractmethod
    def blocks(self, network: Any) -> list[Any]:
        """Return the network's blocks in the order in which they run."""

    @abstractmethod
    def inputs(self, latents: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | None) -> dict[str, Any]:
        """Return the arguments of a call of the network; `latents` have the network's dtype."""

    @abstractmethod
    def velocity(self, output: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        """Return the velocity (batch, channels, height, width) that a call's output stands for."""

    @abstractmethod
    def embed(
        self, network: Any, latents: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | None
    ) -> PartialForward:
        """Return a pass that stands before the first block; `latents` have the network's dtype."""

    @abstractmethod
    def run_block(self, block: Any, state: PartialForward) -> tuple[Tensor | None, Tensor]:
        """Return the text and image tokens after one block."""

    @abstractmethod
    def finish(self, state: PartialForward) -> Tensor:
        """Return the velocity (batch, channels, height, width) of a pass whose blocks have all run."""

    @abstractmethod
    def truncate(self, network: Any, blocks: int) -> None:
        """Remove from `network` all blocks after the first `blocks`, and its output layers."""

    @abstractmethod
    def patch_embedding(self, network: Any) -> Any:
        """Return the layer that embeds the patches."""

    @abstractmethod
    def width(self, network: Any) -> int:
        """Return the width of the network's tokens."""

    # The autoencoder

    @torch.no_grad()
    def encode_images(self, vae: Any, images: Tensor) -> Tensor:
        """Return clean latents (batch, channels, h, w), float32, of images in [0, 1].

        They are the mode of the encoder's Gaussian, shifted and scaled as the autoencoder's configuration says.
        """
        encoded = vae.encode(images.to(vae.device, vae.dtype) * 2 - 1).latent_dist.mode().float()
        return (encoded - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """Return images (batch, 3, height, width), float32 in [0, 1], of clean latents; differentiable."""
        scaled = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def latent_space(self, vae: Any) -> dict[str, Any]:
        """Return what tells one latent space from another: sizes, scale, shift and some of the decoder's weights."""
        weight = vae.decoder.conv_in.weight.detach().flatten()[:16].float().cpu()
        return {
            "channels": int(vae.config.latent_channels),
            "scaling": float(vae.config.scaling_factor),
            "shift": float(vae.config.shift_factor or 0.0),
            "weights": [float(value) for value in weight],
        }

    # Sampling by the diffusers pipeline

    @abstractmethod
    def sample(self, pipeline: Any, prompts: list[str], noise: Tensor, settings: "PipelineSettings") -> Tensor:
        """Return clean latents (batch, channels, h, w) that the diffusers pipeline makes of `noise`, of that shape."""


@dataclass(frozen=True)
class PipelineSettings:
    """How a diffusers pipeline samples; `on_step` is called after every solver step, `resolution` is in pixels."""

    steps: int
    guidance: float
    resolution: int
    text_length: int
    on_step: Callable[[], object] = field(default=lambda: None)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that all pipelines share."""

        def on_step_end(pipeline: Any, step: int, level: Any, state: dict[str, Any]) -> dict[str, Any]:
            self.on_step()
            return state

        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "height": self.resolution,
            "width": self.resolution,
            "max_sequence_length": self.text_length,
            "output_type": "latent",
            "callback_on_step_end": on_step_end,
        }


def class_name(folder: Path) -> str:
    """Return the pipeline class that a folder's model_index.json names. Raises InputError where there is none."""
    try:
        return str(json.loads((folder / "model_index.json").read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is not a model folder: model_index.json is missing or damaged") from None


def level_grid(steps: int, last: float, shift: Callable[[Tensor], Tensor]) -> list[float]:
    """Return `steps` evenly spaced levels from 1 to `last`, shifted, and then 0."""
    return [*shift(torch.linspace(1.0, last, steps, dtype=torch.float64)).tolist(), 0.0]
