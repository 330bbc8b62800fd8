"""Latents that the model makes without adapters, kept between runs: every run begins with evaluating them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nft import rollout
from nft.config import PolicyModelRecipe
from stitchvm_reward import diffusion, families
from stitchvm_reward.cache_folder import GB, cached_file, make_room, mark_used
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.errors import InputError
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.files import content_digest, staged
from stitchvm_reward.hub import locate

LIMIT = 2 * GB


def code_digest() -> str:
    """Identify the code that sampling runs through by its source files."""
    packages = [Path(str(package.__file__)).parent for package in (diffusion, families)]
    sources = [Path(str(rollout.__file__)), *(path for package in packages for path in sorted(package.glob("*.py")))]
    return hashlib.sha256("".join(content_digest(path) for path in sources).encode()).hexdigest()


def machine_settings(device: torch.device) -> dict[str, object]:
    """Return what of a machine and of torch's settings may change the last bit of a result."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {
        "device": f"{device.type}: {hardware}",
        "versions": [torch.__version__, diffusers.__version__],
        "precision": [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Identify named tensors by their number formats, shapes and contents."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}: {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class UntrainedLatents:
    """Clean latents of batches, one safetensors file for each batch.

    A file is named after everything that decides its bits: the weights of the transformer, the noise, what the network
    reads of the prompts, the levels, guidance and number formats, the code, the versions and the device. A run with any
    other of these never finds it. A folder "" keeps nothing.
    """

    def __init__(self, folder: str, model: PolicyModelRecipe, generator: Generator):
        self.folder = Path(folder).expanduser() if folder else None
        self.model, self.generator = model, generator

    @cached_property
    def _setting(self) -> dict[str, object]:
        """What all batches share. Reading the weights' files may take seconds."""
        weights = sorted((locate(self.model.path, ("transformer/*",)) / "transformer").glob("*"))
        return {
            "code": code_digest(),
            "weights": [(path.name, content_digest(path)) for path in weights],
            "model": {key: value for key, value in dataclasses.asdict(self.model).items() if key != "path"},
            "guidance": self.generator.guidance,
            "dtype": str(self.generator.dtype),
        } | machine_settings(self.generator.device)

    def path(self, conditions: Conditions, noise: Tensor, sigmas: list[float]) -> Path:
        """Return where the latents of a batch are kept; `noise` is (batch, c, h, w)."""
        assert self.folder is not None
        inputs = tensors_digest({**conditions.tensors, "noise": noise})
        name = hashlib.sha256(json.dumps([self._setting, inputs, sigmas]).encode()).hexdigest()
        return cached_file(self.folder, name)

    def get(self, conditions: Conditions, noise: Tensor, sigmas: list[float], make: Callable[[], Tensor]) -> Tensor:
        """Return the latents (batch, c, h, w) of a batch on the generator's device: from disk, or else by `make`.

        Raises InputError where they cannot be written.
        """
        if self.folder is None:
            return make()
        path = self.path(conditions, noise, sigmas)
        if mark_used(path):
            try:
                return load_file(path)["latents"].to(self.generator.device)
            except (FileNotFoundError, SafetensorError):  # removed by another run, or damaged
                pass
        latents = make()
        try:
            make_room(self.folder, LIMIT, latents.numel() * latents.itemsize)
            with staged(path) as file:
                save_file({"latents": latents.cpu().contiguous()}, file)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"cannot write evaluation.cache {self.folder}: {error}; set it to '' or elsewhere"
            ) from None
        return latents
