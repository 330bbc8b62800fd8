"""LoRA files that diffusers and ComfyUI both load."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nft.policy import Policy
from stitchvm_reward.errors import InputError


def lora_tensors(policy: Policy, adapter: str):
    """`transformer.LAYER.lora_A/B.weight` in float32 with alpha / rank folded into B.

    Both loaders read this layout alike; a separate alpha would be applied by one and ignored by the other.
    """
    scaling, tensors = policy.scaling(), {}
    for key, matrix in policy.tensors(adapter).items():
        layer, part = key.rsplit(".", 1)
        value = matrix.detach().float().cpu()
        tensors[f"transformer.{layer}.{part}.weight"] = (
            value * scaling[layer] if part == "lora_B" else value
        ).contiguous()
    return tensors


def save_lora(policy: Policy, adapter: str, path: Path, title: str) -> None:
    """Write one adapter as a single safetensors file."""
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora_tensors(policy, adapter), path, metadata=header)


def read_lora(path: Path) -> dict[str, Tensor]:
    """The matrices of a file that `save_lora` wrote: LAYER.lora_A and LAYER.lora_B in float32, B with the scale in it.

    Raises InputError for a file that is missing, damaged or of another layout, whose scale could not be known.
    """
    if not path.is_file():
        raise InputError(f"LoRA file not found: {path}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no safetensors file: {str(error).splitlines()[0]}") from None
    found = {}
    for name, tensor in tensors.items():
        key = name.removeprefix("transformer.").removesuffix(".weight")
        if name != f"transformer.{key}.weight" or not key.endswith((".lora_A", ".lora_B")):
            raise InputError(f"{path} holds {name}: only transformer.LAYER.lora_A.weight and .lora_B.weight are read")
        found[key] = tensor.float()
    if not found:
        raise InputError(f"{path} holds no LoRA matrices")
    return found
