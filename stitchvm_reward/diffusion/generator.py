"""A frozen Stable Diffusion 3 generator: loading, prompt embeddings kept on disk, velocity, decoding."""

import gc
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stitchvm_reward.errors import InputError
from stitchvm_reward.files import staged
from stitchvm_reward.hub import locate

TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
IN_MEMORY = 2048  # prompt embeddings held at once; the rest is read from disk again


def fingerprint(folder: Path) -> str:
    """Identify the text encoders in `folder` by their files: names, sizes and contents (of large ones, the head)."""
    digest = hashlib.sha256()
    for part in TEXT_PARTS:
        for path in sorted((folder / part).glob("*")):
            with path.open("rb") as file:
                digest.update(f"{part}/{path.name}:{path.stat().st_size}:".encode() + file.read(1 << 20))
    return digest.hexdigest()


@dataclass(frozen=True)
class Conditions:
    """What the network reads of a batch of prompts: `tokens` (batch, length, width), `pooled` (batch, width)."""

    tokens: Tensor
    pooled: Tensor

    def expand(self, count: int) -> "Conditions":
        """The conditions of one prompt for `count` samples, without a copy."""
        return Conditions(self.tokens.expand(count, -1, -1), self.pooled.expand(count, -1))

    def select(self, rows: Tensor) -> "Conditions":
        """The conditions of some rows, repeated as often as they are named."""
        return Conditions(self.tokens[rows], self.pooled[rows])


class PromptEmbeddings:
    """Embeddings of prompts, encoded once per distinct text and kept on disk as safetensors.

    A file is named by the model's text encoders, the token length and the text, so another model, length or
    wording never finds it. The text encoders live only while `ensure` runs.
    """

    def __init__(self, model: str, cache: str, t5_length: int, dtype: torch.dtype, device: torch.device):
        self.folder, self.t5_length = locate(model, tuple(f"{part}/*" for part in TEXT_PARTS)), t5_length
        self.cache = Path(cache).expanduser()
        self.dtype, self.device = dtype, device
        self.key = hashlib.sha256(f"{fingerprint(self.folder)}|{t5_length}|{dtype}".encode()).hexdigest()
        self._loaded: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def path(self, text: str) -> Path:
        name = hashlib.sha256(f"{self.key}|{text}".encode()).hexdigest()
        return self.cache / name[:2] / f"{name}.safetensors"

    @torch.no_grad()
    def ensure(self, texts: list[str], batch: int = 16, progress=iter) -> int:
        """Encode the texts that are not on disk yet and return how many those were. Text encoders are freed after."""
        missing = [text for text in dict.fromkeys(texts) if not self.path(text).exists()]
        if not missing:
            # Other processes may have something to encode, and `progress` may be where they meet.
            return len(list(progress(range(0))))
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            self.folder, transformer=None, vae=None, dtype=self.dtype, use_safetensors=True, local_files_only=True
        ).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            encoder.eval()
        for start in progress(range(0, len(missing), batch)):
            texts_now = missing[start : start + batch]
            tokens, _, pooled, _ = pipeline.encode_prompt(
                prompt=texts_now,
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.t5_length,
            )
            for text, token, pool in zip(texts_now, tokens.cpu(), pooled.cpu(), strict=True):
                with staged(self.path(text)) as file:
                    save_file({"tokens": token.contiguous(), "pooled": pool.contiguous()}, file)
        del pipeline, encoder
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return len(missing)

    def _read(self, text: str) -> dict[str, Tensor]:
        if text not in self._loaded:
            self._loaded[text] = load_file(self.path(text))
            if len(self._loaded) > IN_MEMORY:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(text)
        return self._loaded[text]

    def conditions(self, texts: list[str]) -> Conditions:
        """Embeddings of already encoded texts, in order, on the device."""
        found = [self._read(text) for text in texts]
        tokens = torch.stack([item["tokens"] for item in found]).to(self.device)
        return Conditions(tokens, torch.stack([item["pooled"] for item in found]).to(self.device))


def load_vae(model: str, device: torch.device, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The frozen autoencoder of a folder or a hub id. Raises InputError where there is none."""
    folder = locate(model, ("vae/*",))
    try:
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{model} has no autoencoder: {str(error).splitlines()[0]}") from None
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Clean latents (batch, channels, h, w), float32, of images in [0, 1]: the mode of the encoder's Gaussian."""
    encoded = vae.encode(images.to(vae.device, vae.dtype) * 2 - 1).latent_dist.mode().float()
    return (encoded - vae.config.shift_factor) * vae.config.scaling_factor


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (batch, 3, height, width), float32 in [0, 1], of clean latents, by an autoencoder of any dtype;
    differentiable."""
    scaled = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
    decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


class Generator:
    """The frozen transformer and autoencoder of a Stable Diffusion 3 model.

    `resolution` is the side of its images in pixels. The transformer runs in `dtype`, the autoencoder in its own.
    """

    def __init__(self, transformer: SD3Transformer2DModel, vae: AutoencoderKL, shift: float, resolution: int):
        self.transformer: SD3Transformer2DModel = transformer.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.shift, self.resolution = shift, resolution
        self.device, self.dtype = transformer.device, transformer.dtype
        side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (transformer.config.in_channels, side, side)

    @classmethod
    def load(
        cls,
        model: str,
        dtype: torch.dtype,
        device: torch.device,
        resolution: int,
        vae_dtype: torch.dtype = torch.float32,
    ) -> "Generator":
        """Load from a folder or a hub id in the Stable Diffusion 3 layout. Raises InputError where it does not fit."""
        folder = locate(model, ("transformer/*", "vae/*", "scheduler/*"))
        try:
            transformer = SD3Transformer2DModel.from_pretrained(
                folder, subfolder="transformer", dtype=dtype, use_safetensors=True
            )
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{model} is no Stable Diffusion 3 pipeline folder: {reason}") from None
        return cls(transformer.to(device), load_vae(model, device, vae_dtype), scheduler.config.shift, resolution)

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions, network: nn.Module | None = None):
        """Velocity (batch, channels, h, w) in the network's dtype at levels `sigma` in [0, 1], (batch,).

        `network` stands in for the transformer where it is wrapped for training. The timestep stays a float.
        """
        network = self.transformer if network is None else network
        return network(
            hidden_states=latents.to(self.dtype),
            encoder_hidden_states=conditions.tokens,
            pooled_projections=conditions.pooled,
            timestep=sigma.to(self.device, torch.float32) * 1000,
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Images (batch, 3, resolution, resolution), float32 in [0, 1], of clean latents; differentiable."""
        return decode(self.vae, latents)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each transformer block at its first call, for every adapter, shape and kind of block it meets."""
        # Reference, rollout, training and evaluation are variants of one block's code, as are the three kinds of blocks
        # and a last, smaller batch: more than the compiler keeps unless told to.
        torch._dynamo.config.recompile_limit = 64
        for block in self.transformer.transformer_blocks:
            block.compile(backend=backend)
