"""Published shapes of the CLIP models that rewards use."""

import json
from pathlib import Path
from typing import Any

from stitchvm_reward.errors import InputError

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
    """Return a CLIP model's configuration; vocabulary (49,408) and text length (77) are the library's defaults."""
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


def clip_configuration(model: str) -> dict[str, Any]:
    """Return the arguments of CLIPConfig for a folder or a known hub id: both towers and the projection's width.

    Raises InputError for a folder without a CLIP model and for a hub id whose shapes are not known.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        try:
            content = json.loads((folder / "config.json").read_text())
            return {name: content[name] for name in ("vision_config", "text_config", "projection_dim")}
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"{model} is not a CLIP model folder: config.json cannot be used ({reason})") from None
    if model not in CLIPS:
        raise InputError(f"the shapes of {model} are not known; known: {', '.join(CLIPS)}, or a local folder")
    return CLIPS[model]
