"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

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

TRAIN_STEPS = 1000  # the network reads sigma times this as its timestep
_SHARED = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_MEDIUM = _SHARED | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
_LARGE = _SHARED | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}
_VAE = AUTOENCODER_KL | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
_SCHEDULER = {"shift": 3.0}
_LICENSE = "stabilityai-ai-community"
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
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


def static_levels(steps: int, shift: float) -> list[float]:
    """Return the levels of diffusers' FlowMatchEulerDiscreteScheduler with a static shift, and then 0.

    Both ends of the shifted training range, evenly spaced, are shifted a second time.
    """
    lowest = 1 / TRAIN_STEPS
    last = shift * lowest / (1 + (shift - 1) * lowest)
    return level_grid(steps, last, lambda levels: shift * levels / (1 + (shift - 1) * levels))


class StableDiffusion3(Family):
    """Conditions: `tokens` (batch, CLIP and T5 tokens, width) and `pooled` (batch, width)."""

    name = "Stable Diffusion 3"
    pipeline = StableDiffusion3Pipeline
    transformer = SD3Transformer2DModel
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    condition_names = ("tokens", "pooled")
    text_length = 256
    steering_guidance = 4.5
    # Each also ends the name of a layer of Medium's second attention, attn2, when it is written with that prefix.
    lora_targets = tuple(
        f"attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    )
    tag = "stable-diffusion-3"
    published = {
        "stabilityai/stable-diffusion-3.5-medium": Published(
            _MEDIUM,
            _VAE,
            _SCHEDULER,
            "stable-diffusion-v3.5-medium",
            _LICENSE,
            "docs/comfyui/sd35_medium_lora.json",
        ),
        "stabilityai/stable-diffusion-3.5-large": Published(
            _LARGE, _VAE, _SCHEDULER, "stable-diffusion-v3.5-large", _LICENSE
        ),
    }
    published_text = (_CLIP_L, _CLIP_G, _T5_XXL)
    published_text_parameters = 123_650_304 + 694_659_840 + 4_762_310_656
    published_clip_tokens = 77

    def schedule(self, config: Mapping[str, Any], steps: int, latent_shape: tuple[int, ...]) -> list[float]:
        return static_levels(steps, float(config["shift"]))

    def sequence(self, architecture: Architecture, resolution: int, text_length: int) -> tuple[int, int]:
        config = architecture.transformer
        side = architecture.latent_shape(resolution)[1] // config["patch_size"]
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return architecture.clip_tokens + text_length + side**2, width

    def stand_in(self, architecture: Architecture, count: int, text_length: int) -> Conditions:
        config, length = architecture.transformer, architecture.clip_tokens + text_length
        tokens = torch.zeros(count, length, config["joint_attention_dim"])
        return Conditions({"tokens": tokens, "pooled": torch.zeros(count, config["pooled_projection_dim"])})

    def text_modules(self, architecture: Architecture, text_length: int) -> list[tuple[nn.Module, int]]:
        first, second, third = architecture.text_encoders
        return [
            (CLIPTextModelWithProjection(CLIPTextConfig(**first)), architecture.clip_tokens),
            (CLIPTextModelWithProjection(CLIPTextConfig(**second)), architecture.clip_tokens),
            (T5EncoderModel(T5Config(**third)), text_length),
        ]

    def encode(self, pipeline: Any, texts: list[str], text_length: int) -> dict[str, Tensor]:
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt=texts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            device=pipeline.device,
            max_sequence_length=text_length,
        )
        return {"tokens": tokens, "pooled": pooled}

    def kept(self, architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # CLIP's tokens are padded with zeros to the width of T5's. The tokens of the padding are kept: no mask hides
        # them from the network, and T5 and CLIP encode them differently for every text.
        tokens, width = tensors["tokens"], sum(text["hidden_size"] for text in architecture.text_encoders[:2])
        clip, t5 = tokens[:, : architecture.clip_tokens, :width], tokens[:, architecture.clip_tokens :]
        return {"clip": clip, "t5": t5, "pooled": tensors["pooled"]}

    def restored(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        clip, t5 = kept["clip"], kept["t5"]
        clip = nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {"tokens": torch.cat([clip, t5], dim=1), "pooled": kept["pooled"]}

    def blocks(self, network: Any) -> list[Any]:
        return list(network.transformer_blocks)

    def inputs(self, latents: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | None) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": conditions["tokens"],
            "pooled_projections": conditions["pooled"],
            "timestep": sigma * TRAIN_STEPS,
            "return_dict": False,
        }

    def velocity(self, output: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        return output

    def embed(
        self, network: Any, latents: Tensor, sigma: Tensor, conditions: Conditions, guidance: float | None
    ) -> PartialForward:
        dtype, patch = latents.dtype, int(network.config.patch_size)
        image = network.pos_embed(latents).contiguous()
        time = network.time_text_embed(sigma * TRAIN_STEPS, conditions["pooled"].to(dtype))
        text = network.context_embedder(conditions["tokens"].to(dtype))
        return PartialForward(
            self, network, (latents.shape[-2] // patch, latents.shape[-1] // patch), text, image, time
        )

    def run_block(self, block: Any, state: PartialForward) -> tuple[Tensor | None, Tensor]:
        return block(hidden_states=state.image, encoder_hidden_states=state.text, temb=state.time)

    def finish(self, state: PartialForward) -> Tensor:
        network, (rows, columns) = state.network, state.grid
        patches, patch = network.proj_out(network.norm_out(state.image, state.time)), network.config.patch_size
        patches = patches.view(len(patches), rows, columns, patch, patch, network.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * patch, columns * patch)

    def truncate(self, network: Any, blocks: int) -> None:
        network.transformer_blocks = nn.ModuleList(network.transformer_blocks[:blocks])
        network.norm_out, network.proj_out = nn.Identity(), nn.Identity()

    def patch_embedding(self, network: Any) -> Any:
        return network.pos_embed.proj

    def width(self, network: Any) -> int:
        return network.inner_dim

    def sample(self, pipeline: Any, prompts: list[str], noise: Tensor, settings: PipelineSettings) -> Tensor:
        return pipeline(prompts, latents=noise, **settings.arguments()).images
