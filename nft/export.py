"""LoRA files that diffusers and ComfyUI both load."""

from pathlib import Path

from safetensors.torch import save_file

from nft.policy import Policy


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
