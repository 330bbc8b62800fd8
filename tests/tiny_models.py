"""Tiny random pipelines of each family, with the parts and the layout of the published ones."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from miniature import wording

WIDTH = 32
RESOLUTION = 32  # latents of 4 x 4


def _randomised(network: nn.Module, seed: int) -> nn.Module:
    """Draw all weights anew: layers that start at zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network.eval()


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return _randomised(vae, 1)


def _clip_config(vocabulary: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        max_position_embeddings=wording.LENGTH,
        eos_token_id=vocabulary - 1,
    )


def _t5(vocabulary: int) -> T5EncoderModel:
    config = T5Config(vocab_size=vocabulary, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0)
    return _randomised(T5EncoderModel(config), 2)


def tiny_flux(folder: Path) -> Path:
    """Write a FluxPipeline of two double and three single blocks, with a guidance embedding."""
    clip, t5 = wording.clip_tokenizer(), wording.t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(),
        text_encoder=_randomised(CLIPTextModel(_clip_config(len(clip))), 3),
        tokenizer=clip,
        text_encoder_2=_t5(len(t5)),
        tokenizer_2=t5,
        transformer=_randomised(transformer, 4),
    ).save_pretrained(folder)
    return folder


def tiny_sd3(folder: Path) -> Path:
    """Write a StableDiffusion3Pipeline of four blocks, the first two with a second attention."""
    clip, t5 = wording.clip_tokenizer(), wording.t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=RESOLUTION // 8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    t5_model = T5EncoderModel(
        T5Config(vocab_size=len(t5), d_model=2 * WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0)
    )
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=_randomised(CLIPTextModelWithProjection(_clip_config(len(clip))), 5),
        tokenizer=clip,
        text_encoder_2=_randomised(CLIPTextModelWithProjection(_clip_config(len(clip))), 6),
        tokenizer_2=wording.clip_tokenizer(pad_token="!"),
        text_encoder_3=_randomised(t5_model, 7),
        tokenizer_3=t5,
        transformer=_randomised(transformer, 8),
    ).save_pretrained(folder)
    return folder
