"""LoRA files that diffusers and ComfyUI both load: the only writer, and a loader that counts what it attached."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nft.config import Recipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import family_of
from stitchvm_reward.families.family import Family
from stitchvm_reward.files import staged

PREFIX = Family.lora_prefix  # the same for all families, so that a file can be read before its model is known
LORA_NAME = "stitch_nft_lora.safetensors"


def lora_tensors(
    matrices: Mapping[str, Tensor], scaling: Mapping[str, float], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return PREFIX + `LAYER.lora_A/B.weight` in `dtype` for LAYER.lora_A (rank, in) and LAYER.lora_B (out, rank).

    Each layer's factor is folded into B in float32, before the cast. Both loaders read this layout alike; a separate
    alpha would be applied by one and ignored by the other.
    """
    tensors = {}
    for key, matrix in matrices.items():
        layer, part = key.rsplit(".", 1)
        value = matrix.detach().float().cpu()
        folded = value * scaling[layer] if part == "lora_B" else value
        tensors[f"{PREFIX}{layer}.{part}.weight"] = folded.to(dtype).contiguous()
    return tensors


def reward_text(recipe: Recipe) -> str:
    """Return a recipe's weighted sum of rewards as text."""
    return " + ".join(f"{reward.weight:g} x {reward.name}" for reward in recipe.rewards)


def default_title(recipe: Recipe) -> str:
    """Return the title of a run's adapters where the user gives none."""
    return f"stitch-nft {Path(recipe.out).name}"


def lora_header(
    recipe: Recipe,
    config: Mapping[str, Any],
    epoch: int,
    date: datetime | None = None,
    *,
    title: str | None = None,
    license_name: str | None = None,
    author: str | None = None,
) -> dict[str, str]:
    """Return a safetensors header as the modelspec standard defines it, for adapters of a transformer's `config`.

    Architecture and licence are included where the configuration has the shape of a published model. The default of
    `date` is now.
    """
    name, family = Path(recipe.out).name, family_of(recipe.model.path)
    published = family.published_as(config)
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title or default_title(recipe),
        "modelspec.resolution": f"{recipe.model.resolution}x{recipe.model.resolution}",
        "modelspec.date": (date or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.description": f"LoRA adapters of rank {recipe.lora.rank} by reinforcement (stitch-nft), "
        f"recipe {name}, reward {reward_text(recipe)}, epoch {epoch}",
    }
    if published is not None:
        model = family.published[published]
        header["modelspec.architecture"] = f"{model.modelspec}/lora"
        header["modelspec.license"] = model.license_name
    if license_name is not None:
        header["modelspec.license"] = license_name
    if author is not None:
        header["modelspec.author"] = author
    return header


def save_lora(
    path: Path,
    matrices: Mapping[str, Tensor],
    scaling: Mapping[str, float],
    header: dict[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write one adapter as a single safetensors file, complete or not at all."""
    with staged(path) as file:
        file.write_bytes(save(lora_tensors(matrices, scaling, dtype), metadata=header))


def read_header(path: Path) -> dict[str, str]:
    """Return the header of a safetensors file. Raises InputError where it cannot be read."""
    with _opened(path) as file:
        return file.metadata() or {}


def lora_layers(path: Path) -> set[str]:
    """Return the transformer layers of a LoRA file in the layout of `lora_tensors`.

    Raises InputError for a file that cannot be read, is in PEFT's own layout or holds no such layer.
    """
    with _opened(path) as file:
        keys = list(file.keys())
    if any(key.startswith("base_model.model.") for key in keys):
        raise InputError(
            f"{path} is in PEFT's layout, from which diffusers attaches nothing; export with --format comfyui instead"
        )
    ending = ".lora_A.weight"
    layers = {key[len(PREFIX) : -len(ending)] for key in keys if key.startswith(PREFIX) and key.endswith(ending)}
    if not layers:
        raise InputError(f"{path} holds no {PREFIX}LAYER{ending}; give a LoRA file that launch/export.py wrote")
    return layers


def read_lora(path: Path) -> dict[str, Tensor]:
    """Return LAYER.lora_A and LAYER.lora_B of a file in the layout of `lora_tensors`, in float32, the scale in B.

    Raises InputError as `lora_layers` does, and for a file with any other tensor, whose meaning would be unknown.
    """
    layers = lora_layers(path)
    names = {f"{PREFIX}{layer}.{part}.weight": f"{layer}.{part}" for layer in layers for part in ("lora_A", "lora_B")}
    with _opened(path) as file:
        odd = sorted(names.keys() ^ set(file.keys()))
        if odd:
            raise InputError(f"{path} must hold lora_A and lora_B of each layer and nothing else; see {odd[0]}")
        return {key: file.get_tensor(name).float() for name, key in names.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise InputError(f"LoRA file not found: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {str(error).splitlines()[0]}") from None


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Silence a library's log; the caller reports errors in one line."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def attach_lora(model: Any, path: Path) -> dict[str, Any]:
    """Load a LoRA file into a diffusers pipeline, or into a transformer, and return the adapted layers by name.

    diffusers may attach only a part of a file, or nothing, without an error. Raises InputError unless every layer of
    the file was attached and no other.
    """
    expected = lora_layers(path)
    load = model.load_lora_weights if hasattr(model, "load_lora_weights") else model.load_lora_adapter
    try:
        with _silent("diffusers"):
            load(str(path))
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        message = " ".join(str(error).split())[:200]
        raise InputError(f"{path} does not fit this model ({message}); give the base that it was trained on") from None
    transformer = getattr(model, "transformer", model)
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, LoraLayer)}
    if layers.keys() != expected:
        raise InputError(
            f"{path} holds {len(expected)} layers and diffusers attached {len(layers.keys() & expected)} of them; "
            "give the base that it was trained on"
        )
    return layers
