"""LoRA files that diffusers and ComfyUI both load: the one writer, and a loader that counts what it attached."""

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
from stitchvm_reward.files import staged

PREFIX = "transformer."
LORA_NAME = "stitch_nft_lora.safetensors"


def lora_tensors(
    matrices: Mapping[str, Tensor], scaling: Mapping[str, float], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """`transformer.LAYER.lora_A/B.weight` in `dtype`, of matrices LAYER.lora_A (rank, in) and LAYER.lora_B (out, rank).

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
    """What a recipe rewards, as its weighted sum."""
    return " + ".join(f"{reward.weight:g} x {reward.name}" for reward in recipe.rewards)


def default_title(recipe: Recipe) -> str:
    """What a run's adapters are called unless the user says otherwise."""
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
    """A safetensors header after the modelspec standard, for adapters on a transformer of configuration `config`.

    The architecture and a licence are told where the shape is a published one's; `date` is now by default.
    """
    name = Path(recipe.out).name
    family = family_of(recipe.model.path)
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
        header["modelspec.architecture"] = f"{family.published[published].modelspec}/lora"
        header["modelspec.license"] = family.published[published].license_name
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
    """Write one adapter as a single safetensors file, which is there whole or not at all."""
    with staged(path) as file:
        file.write_bytes(save(lora_tensors(matrices, scaling, dtype), metadata=header))


def read_header(path: Path) -> dict[str, str]:
    """The header of a safetensors file. Raises InputError where it cannot be read as one."""
    with _opened(path) as file:
        return file.metadata() or {}


def lora_layers(path: Path) -> set[str]:
    """The transformer layers that a LoRA file in the layout of `lora_tensors` is for.

    Raises InputError for a file that cannot be read, is in PEFT's own layout or holds no such layer.
    """
    with _opened(path) as file:
        keys = list(file.keys())
    if any(key.startswith("base_model.model.") for key in keys):
        raise InputError(
            f"{path} is in PEFT's layout, of which diffusers attaches nothing; export with --format comfyui instead"
        )
    ending = ".lora_A.weight"
    layers = {key[len(PREFIX) : -len(ending)] for key in keys if key.startswith(PREFIX) and key.endswith(ending)}
    if not layers:
        raise InputError(f"{path} holds no {PREFIX}LAYER{ending}; give a LoRA file that launch/export.py wrote")
    return layers


def read_lora(path: Path) -> dict[str, Tensor]:
    """The matrices of a file in the layout of `lora_tensors`: LAYER.lora_A and LAYER.lora_B in float32, scale in B.

    Raises InputError as `lora_layers` does, and for a file that holds anything else, whose meaning is not known here.
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
    """Keep a library's log quiet: what went wrong is told in one line by the caller."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def attach_lora(model: Any, path: Path) -> dict[str, Any]:
    """Load a LoRA file into a diffusers pipeline, or into its transformer alone; the adapted layers by name.

    diffusers may attach only a part of a file, or nothing, without raising. Raises InputError unless every layer of
    the file was attached and no other.
    """
    expected = lora_layers(path)
    load = model.load_lora_weights if hasattr(model, "load_lora_weights") else model.load_lora_adapter
    try:
        with _silent("diffusers"):
            load(str(path))
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        told = " ".join(str(error).split())[:200]
        raise InputError(f"{path} does not fit this model ({told}); give the base that it was trained on") from None
    transformer = getattr(model, "transformer", model)
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, LoraLayer)}
    if layers.keys() != expected:
        raise InputError(
            f"{path} holds {len(expected)} layers and diffusers attached {len(layers.keys() & expected)} of them; "
            "give the base that it was trained on"
        )
    return layers
