"""Loading a transformer for ZeRO-3: every block is sharded as soon as it has been read, so that none holds it whole."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from stitchvm_reward.diffusion.backbone import empty_transformer, read_weights
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import family_of
from stitchvm_reward.hub import locate


def load_sharded(model: ModelRecipe, accelerator: Accelerator) -> Any:
    """Return the frozen transformer of a folder or a hub id, of which every process holds its shards only.

    A process holds at most its shards and one whole block. All processes call this together, launched with ZeRO-3.
    Raises InputError where the model is missing or damaged.
    """
    import deepspeed

    family = family_of(model.path)
    folder = locate(model.path, ("transformer/*",)) / "transformer"
    given = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    # DeepSpeed reads a whole configuration, of which only this part concerns the shards.
    zero = {key: value for key, value in given.items() if value != "auto"}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    try:
        network = empty_transformer(family, folder, model.path).eval().requires_grad_(False)
        names = {module: f"{name}." for name, module in network.named_modules()}
        parts = [(block, names[block]) for block in family.blocks(network)]
        for part, prefix in [*parts, (network, "")]:
            _read(part, prefix, folder, model.torch_dtype, accelerator.device)
            deepspeed.zero.Init(module=part, config_dict_or_path=config)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{model.path} is not a complete {family.name} pipeline folder: {reason}") from None
    return network


def _read(part: Any, prefix: str, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Read what a part of the network still lacks; the names of its tensors in the folder begin with `prefix`."""
    lacking = [prefix + name for name, tensor in part.state_dict().items() if tensor.is_meta]
    tensors = {
        name.removeprefix(prefix): tensor.to(device, dtype, copy=True) for name, tensor in read_weights(folder, lacking)
    }
    part.load_state_dict(tensors, strict=False, assign=True)
