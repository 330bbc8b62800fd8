"""Published shapes of the models that are planned for before they are downloaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stitchvm_reward.errors import InputError

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
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "stabilityai/stable-diffusion-3.5-medium": _SHARED
    | {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    "stabilityai/stable-diffusion-3.5-large": _SHARED
    | {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
    },
}
VAE: dict[str, Any] = {
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
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
_VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
VISION: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {"vision_config": _VIT_L | {"image_size": 224, "patch_size": 14}},
    "openai/clip-vit-large-patch14-336": {"vision_config": _VIT_L | {"image_size": 336, "patch_size": 14}},
    "apple/DFN5B-CLIP-ViT-H-14-378": {
        "vision_config": _VIT_H | {"image_size": 378, "patch_size": 14},
        "projection_dim": 1024,
    },
    "adams-story/HPSv2-hf": {
        "vision_config": _VIT_H | {"image_size": 224, "patch_size": 14},
        "projection_dim": 1024,
    },
}
CLIP_TOKENS = 77
TEXT_PARAMETERS = 123_650_304 + 694_659_840 + 4_762_310_656  # CLIP-L, CLIP-bigG, T5-XXL


def configurations(model: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Transformer configuration, autoencoder configuration and CLIP text length of a folder or a known hub id."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        try:
            transformer, vae = (
                json.loads((folder / part / "config.json").read_text()) for part in ("transformer", "vae")
            )
            tokenizer = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{model} is no Stable Diffusion 3 pipeline folder: {error}") from None
        return transformer, vae, int(tokenizer["model_max_length"])
    if model not in TRANSFORMERS:
        raise InputError(f"the shape of {model} is not known here; known: {', '.join(TRANSFORMERS)}, or a local folder")
    return TRANSFORMERS[model], VAE, CLIP_TOKENS


def published_as(config: Mapping[str, Any]) -> str | None:
    """The hub id of the published transformer that `config` has the shape of, or None."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    for name, shape in TRANSFORMERS.items():
        whole = {"dual_attention_layers": ()} | shape
        if all(plain(config.get(key)) == plain(value) for key, value in whole.items()):
            return name
    return None


def vision_configuration(model: str) -> dict[str, Any]:
    """What a CLIP model's configuration says of its image tower, of a folder or a known hub id."""
    config = Path(model).expanduser() / "config.json"
    if config.is_file():
        content = json.loads(config.read_text())
        return {"vision_config": content["vision_config"], "projection_dim": content["projection_dim"]}
    if model not in VISION:
        raise InputError(f"the shape of {model} is not known here; known: {', '.join(VISION)}, or a local folder")
    return {"projection_dim": 768} | VISION[model]
