"""What the steps need to be installed, checked before anything is imported that may be missing."""

import importlib.util

NEEDED = ("torch", "diffusers", "transformers", "peft", "accelerate", "omegaconf", "safetensors", "scipy", "matplotlib")
OPTIONAL = ("deepspeed", "bitsandbytes")  # sub-steps that use them are reported as skipped


def missing(names: tuple[str, ...]) -> list[str]:
    """Return the packages that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def message(names: list[str]) -> str:
    """Say what is missing and how to get it, next to the torch that is there."""
    return (
        f"error: {', '.join(names)} not installed: run pip install --editable . --constraint constraints.txt in the "
        "repository (leave out --constraint to keep this machine's own torch and transformers), and for ZeRO "
        "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
    )
