"""Published shapes of the models that are planned for before they are downloaded."""

import json
from collections.abc import Iterable, Mapping
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
_VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_TEXT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_TEXT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def _clip(vision: dict[str, Any], text: dict[str, Any], projection: int, side: int, activation: str) -> dict[str, Any]:
    """A CLIP model's configuration; vocabulary (49,408) and text length (77) are the library's defaults."""
    return {
        "vision_config": vision | {"image_size": side, "hidden_act": activation},
        "text_config": text | {"hidden_act": activation},
        "projection_dim": projection,
    }


CLIPS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": _clip(_VIT_L, _TEXT_L, 768, 224, "quick_gelu"),
    "openai/clip-vit-large-patch14-336": _clip(_VIT_L, _TEXT_L, 768, 336, "quick_gelu"),
    "apple/DFN5B-CLIP-ViT-H-14-378": _clip(_VIT_H, _TEXT_H, 1024, 378, "quick_gelu"),
    "adams-story/HPSv2-hf": _clip(_VIT_H, _TEXT_H, 1024, 224, "gelu"),
    "yuvalkirstain/PickScore_v1": _clip(_VIT_H, _TEXT_H, 1024, 224, "gelu"),
}
CLIP_TOKENS = 77
_CLIP_L = _TEXT_L | {"projection_dim": 768, "hidden_act": "quick_gelu"}
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
TEXT_ENCODERS: tuple[dict[str, Any], ...] = (_CLIP_L, _CLIP_G, _T5_XXL)
# Of the encoders of CLIP L and CLIP G, each with its projection, and of T5 XXL.
TEXT_PARAMETERS = 123_650_304 + 694_659_840 + 4_762_310_656


def _read(folder: Path, parts: Iterable[str]) -> list[dict[str, Any]]:
    """JSON files of a pipeline's folder. Raises InputError where one is missing or no JSON."""
    try:
        return [json.loads((folder / part).read_text()) for part in parts]
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no Stable Diffusion 3 pipeline folder: {error}") from None


def configurations(model: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Transformer configuration, autoencoder configuration and CLIP text length of a folder or a known hub id.

    Raises InputError for a folder that is no pipeline's, or a hub id whose shape is not known here.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        parts = ("transformer/config.json", "vae/config.json", "tokenizer/tokenizer_config.json")
        transformer, vae, tokenizer = _read(folder, parts)
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


def text_configurations(model: str) -> tuple[dict[str, Any], ...]:
    """Configurations of the two CLIP text encoders and of the T5 encoder, of a folder or a known hub id.

    Raises InputError as `configurations` does.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        configurations(model)  # raises where the shape is not known
        return TEXT_ENCODERS
    parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return tuple(_read(folder, (f"{part}/config.json" for part in parts)))


def clip_configuration(model: str) -> dict[str, Any]:
    """Both towers and the projection's width of a CLIP model, as CLIPConfig takes them: of a folder or a known hub id.

    Raises InputError for a folder that holds no CLIP model, or a hub id whose shape is not known here.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        try:
            content = json.loads((folder / "config.json").read_text())
            return {name: content[name] for name in ("vision_config", "text_config", "projection_dim")}
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"{model} is no CLIP model folder: config.json cannot be used ({reason})") from None
    if model not in CLIPS:
        raise InputError(f"the shape of {model} is not known here; known: {', '.join(CLIPS)}, or a local folder")
    return CLIPS[model]
