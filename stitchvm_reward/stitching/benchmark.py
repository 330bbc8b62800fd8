"""What one score costs: a stitched value beside Tweedie's, at the real shapes and with random weights."""

import platform
import subprocess
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPConfig, CLIPModel

from stitchvm_reward.diffusion.architectures import clip_configuration, configurations
from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.generator import Conditions, Generator
from stitchvm_reward.diffusion.path import denoised
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards.clip import FITS
from stitchvm_reward.rewards.preprocess import normalise
from stitchvm_reward.rewards.tail import RewardTail
from stitchvm_reward.stitching.config import StitchRecipe
from stitchvm_reward.stitching.value_model import ValueNetwork

SIGMA = 0.5
# The cut of a recipe that leaves it to the search: what that finds for Stable Diffusion 3.5 Medium.
BLOCK, REWARD_BLOCK = 4, 1


def _attention(query: Any, key: Any, value: Any, *_, out_shape: Any = None, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_, out_shape: Any = None, **__) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def flop_counter() -> FlopCounterMode:
    """The library's counter, with the CPU's attention, which it does not know of by itself."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={attention: _attention, backward: _attention_backward})


def flops(call: Callable[[], Any]) -> float:
    """Floating-point operations of one call, a multiply-add counted as two; on the meta device nothing is computed."""
    counter = flop_counter()
    with counter:
        call()
    return float(counter.get_total_flops())


def timed(call: Callable[[], Any], samples: int, device: torch.device, repeats: int) -> dict[str, float | None]:
    """Median milliseconds, GFLOP and, on a GPU, peak MiB of a call, the first two per sample, after one to warm up."""
    cuda = device.type == "cuda"
    counted = flops(call)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return {
        "milliseconds": sorted(times)[repeats // 2] / samples * 1e3,
        "gigaflop": counted / samples / 1e9,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
    }


class _Live(TorchDispatchMode):
    """Adds up the bytes of the storages that operations make while they are alive."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        def storages(tree: Any) -> dict[int, Any]:
            tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
            return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}

        old = storages((arguments, named))
        result = function(*arguments, **(named or {}))
        for key, storage in storages(result).items():
            if key not in old and key not in self.seen:  # no view of what was there
                self.seen.add(key)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.bytes -= size


def peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """Peak MiB of the tensors that a call makes; on a GPU, of what it allocates beside what was there.

    On a CPU, what single operations need inside is left out.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with _Live() as live:
        call()
    return live.peak / 2**20


def randomised(network: nn.Module, dtype: torch.dtype, device: torch.device) -> Any:
    """A network of the meta device on a real one, its weights drawn: a GPU is faster on zeros than on numbers."""
    network = network.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            tensor.normal_(0, 0.02)
        elif tensor.ndim:  # positions
            tensor.copy_(torch.arange(tensor.numel(), device=device).view_as(tensor))
    return network


def random_generator(model: str, dtype: str, vae_dtype: str, resolution: int, device: torch.device) -> Generator:
    """A generator of a folder's or a known hub id's shapes with random weights; shift 3. Raises InputError."""
    transformer_config, vae_config, _ = configurations(model)
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(transformer_config)
        vae = AutoencoderKL.from_config(vae_config)
    transformer = randomised(transformer, getattr(torch, dtype), device)
    return Generator(transformer, randomised(vae, getattr(torch, vae_dtype), device), 3.0, resolution)


def random_clip(model: str, device: torch.device) -> CLIPModel:
    """A float32 CLIP model of a folder's or a known hub id's shapes with random weights. Raises InputError."""
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**clip_configuration(model)))
    return randomised(clip, torch.float32, device)


def pixel_embedding(clip: CLIPModel, kind: str, images: Tensor) -> Tensor:
    """What a reward of this kind makes of (batch, 3, h, w) images in [0, 1], up to its embedding."""
    pixels = normalise(FITS[kind](images, clip.config.vision_config.image_size))
    return clip.get_image_features(pixel_values=pixels).pooler_output


def score_costs(recipe: StitchRecipe, batch: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for a stitched value and one for Tweedie's, of `batch` latents at once, in this one run.

    `recipe` names the shapes and the blocks; its hub ids are not asked, nothing is read but configurations. Raises
    InputError for a model whose shape is not known here.
    """
    block, reward_block = recipe.backbone.block or BLOCK, recipe.reward.block or REWARD_BLOCK
    transformer_config, _, clip_tokens = configurations(recipe.backbone.path)
    depth = int(transformer_config["num_layers"])
    if block > depth:
        raise InputError(f"backbone.block must be at most {depth}, the backbone's blocks, got {block}")
    clip = random_clip(recipe.reward.model, device)
    backbone = recipe.backbone
    generator = random_generator(backbone.path, backbone.dtype, "float32", backbone.resolution, device)
    transformer, dtype, head = generator.transformer, generator.dtype, BackboneHead(generator.transformer)
    network = ValueNetwork(head.width(block), RewardTail(clip, reward_block)).to(device).eval()
    tokens = torch.randn(batch, clip_tokens + recipe.backbone.t5_length, transformer.config.joint_attention_dim)
    pooled = torch.randn(batch, transformer.config.pooled_projection_dim)
    conditions = Conditions(tokens.to(device, dtype), pooled.to(device, dtype))
    latents = torch.randn(batch, *generator.latent_shape, device=device)
    sigma = torch.full((batch,), SIGMA, device=device)

    def stitched() -> Tensor:
        return network(head.features(latents, sigma, conditions, [block])[block])[1]

    def tweedie() -> Tensor:
        velocity = generator.velocity(latents, sigma, conditions).float()
        images = generator.decode(denoised(latents, velocity, sigma[:, None, None, None]))
        return pixel_embedding(clip, recipe.reward.kind, images)

    with torch.no_grad():
        return [
            {"method": name} | timed(call, batch, device, repeats)
            for name, call in (("stitched", stitched), ("tweedie", tweedie))
        ]


def machine(device: torch.device) -> dict[str, Any]:
    """What figures are worth nothing without."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    versions = {library.__name__: library.__version__ for library in (torch, diffusers, transformers, peft)}
    return {"device": name, "threads": torch.get_num_threads(), "commit": _commit()} | versions


def _commit() -> str:
    """The repository's commit, marked where files differ from it; empty outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip()
