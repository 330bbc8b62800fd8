"""FLUX.1: guidance-distilled transformers of double and single blocks on packed latents."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from stitchvm_reward.families.family import (
    AUTOENCODER_KL,
    Architecture,
    Conditions,
    Family,
    PartialForward,
    PipelineSettings,
    Published,
    level_grid,
)

PATCH = 2  # latents are packed in squares of this side
AXES = 3  # coordinates of a token's position, the first of which FLUX.1 leaves at zero
_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
_SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


def pack(latents: Tensor) -> Tensor:
    """Return latents (batch, channels, height, width) as tokens (batch, patches, 4 channels)."""
    return nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return tokens (batch, patches, 4 channels) on a grid of patches as latents (batch, channels, height, width)."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), PATCH)


def image_positions(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return the positions (rows * columns, 3) of the image tokens, float32."""
    rows, columns = (torch.arange(size, device=device, dtype=torch.float32) for size in grid)
    positions = torch.zeros(*grid, AXES, device=device)
    positions[..., 1], positions[..., 2] = rows[:, None], columns[None, :]
    return positions.flatten(0, 1)


def resolution_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Return the logarithm mu of the schedule's shift, linear in the number of image tokens."""
    first, last = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (last - first)
    return config["base_shift"] + slope * (tokens - first)


class Flux(Family):
    """Conditions: `tokens` (batch, T5 tokens, width) and `pooled` (batch, width). Text positions are all zero."""

    name = "FLUX.1"
    pipeline = FluxPipeline
    transformer = FluxTransformer2DModel
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    condition_names = ("tokens", "pooled")
    text_length = 512
    guidance = 3.5
    steering_guidance = 3.5
    # The single blocks' output projection mixes attention with the feed-forward layer and is left as it is.
    lora_targets = tuple(
        f"attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    )
    tag = "flux"
    published = {
        "black-forest-labs/FLUX.1-dev": Published(
            _DEV,
            AUTOENCODER_KL | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
            _SCHEDULER,
            "flux-1-dev",
            "flux-1-dev-non-commercial-license",
        )
    }
    published_text = (_CLIP_L, _T5_XXL)
    published_text_parameters = 123_060_480 + 4_762_310_656
    published_clip_tokens = 77

    def embeds_guidance(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("guidance_embeds"))

    def schedule(self, config: Mapping[str, Any], steps: int, latent_shape: tuple[int, ...]) -> list[float]:
        tokens = (latent_shape[-2] // PATCH) * (latent_shape[-1] // PATCH)
        dynamic = config.get("use_dynamic_shifting")
        factor = math.exp(resolution_shift(config, tokens)) if dynamic else float(config["shift"])
        return level_grid(steps, 1 / steps, lambda levels: factor / (factor + (1 / levels - 1)))

    def sequence(self, architecture: Architecture, resolution: int, text_length: int) -> tuple[int, int]:
        config = architecture.transformer
        side = architecture.latent_shape(resolution)[1] // PATCH
        return text_length + side**2, config["num_attention_heads"] * config["attention_head_dim"]

    def stand_in(self, architecture: Architecture, count: int, text_length: int) -> Conditions:
        config = architecture.transformer
        tokens = torch.zeros(count, text_length, config["joint_attention_dim"])
        return Conditions({"tokens": tokens, "pooled": torch.zeros(count, config["pooled_projection_dim"])})

    def text_modules(self, architecture: Architecture, text_length: int) -> list[tuple[nn.Module, int]]:
        first, second = architecture.text_encoders
        return [
            (CLIPTextModel(CLIPTextConfig(**first)), architecture.clip_tokens),
            (T5EncoderModel(T5Config(**second)), text_length),
        ]

    def encode(self, pipeline: Any, texts: list[str], text_length: int) -> dict[str, Tensor]:
        tokens, pooled, _ = pipeline.encode_prompt(
            prompt=texts, prompt_2=None, device=pipeline.device, max_sequence_length=text_length
        )
        return {"tokens": tokens, "pooled": pooled}

    def blocks(self, network: Any) -> list[Any]:
        return [*network.transformer_blocks, *network.single_transformer_blocks]

    def inputs(self, latents: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | None) -> dict[str, Any]:
        grid, text = self._grid(latents), conditions["tokens"]
        return {
            "hidden_states": pack(latents),
            "encoder_hidden_states": text,
            "pooled_projections": conditions["pooled"],
            "timestep": sigma,
            "img_ids": image_positions(grid, latents.device),
            "txt_ids": torch.zeros(text.shape[1], AXES, device=latents.device),
            "guidance": None if guidance is None else torch.full_like(sigma, guidance),
            "return_dict": False,
        }

    @staticmethod
    def _grid(latents: Tensor) -> tuple[int, int]:
        return latents.shape[-2] // PATCH, latents.shape[-1] // PATCH

    def velocity(self, output: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        return unpack(output, (latent_shape[-2] // PATCH, latent_shape[-1] // PATCH))

    def embed(
        self, network: Any, latents: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | None
    ) -> PartialForward:
        given = self.inputs(latents, sigma, conditions, guidance)
        image = network.x_embedder(given["hidden_states"])
        scales = [given[name] for name in ("timestep", "guidance") if given[name] is not None]
        times = [scale.to(image.dtype) * 1000 for scale in scales]
        time = network.time_text_embed(*times, given["pooled_projections"].to(image.dtype))
        text = network.context_embedder(given["encoder_hidden_states"].to(image.dtype))
        positions = network.pos_embed(torch.cat([given["txt_ids"], given["img_ids"]]))
        return PartialForward(
            self, network, self._grid(latents), text, image, time, shared=positions, guidance=guidance
        )

    def run_block(self, block: Any, state: PartialForward) -> tuple[Tensor | None, Tensor]:
        return block(
            hidden_states=state.image,
            encoder_hidden_states=state.text,
            temb=state.time,
            image_rotary_emb=state.shared,
        )

    def finish(self, state: PartialForward) -> Tensor:
        network = state.network
        return unpack(network.proj_out(network.norm_out(state.image, state.time)), state.grid)

    def truncate(self, network: Any, blocks: int) -> None:
        double = len(network.transformer_blocks)
        network.transformer_blocks = nn.ModuleList(network.transformer_blocks[:blocks])
        network.single_transformer_blocks = nn.ModuleList(network.single_transformer_blocks[: max(0, blocks - double)])
        network.norm_out, network.proj_out = nn.Identity(), nn.Identity()

    def patch_embedding(self, network: Any) -> Any:
        return network.x_embedder

    def width(self, network: Any) -> int:
        return network.inner_dim

    def sample(self, pipeline: Any, prompts: list[str], noise: Tensor, settings: PipelineSettings) -> Tensor:
        tokens = pipeline(prompts, latents=pack(noise), **settings.arguments()).images
        return unpack(tokens, self._grid(noise))
