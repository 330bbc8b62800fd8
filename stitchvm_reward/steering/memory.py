"""The memory of steered sampling: what a step needs, and how many latents of a micro batch fit."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stitchvm_reward.errors import InputError
from stitchvm_reward.families.family import Family
from stitchvm_reward.measure import peak_of_created
from stitchvm_reward.rewards.clip import ImageTower, TextTower
from stitchvm_reward.steering.denoiser import Denoiser
from stitchvm_reward.steering.settings import Settings
from stitchvm_reward.steering.values import StitchedValue, TweedieValue, Value

GIB = 2**30
MOST = 16  # latents of a micro batch that is chosen here: more are hardly faster
SHARE = 0.9  # of the free memory; the rest is left to the allocator and to single kernels


def free_memory(device: torch.device) -> int:
    """Return the free bytes of the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _ImagesOnly:
    """What a reward does with images, without its texts and without code that is not known here."""

    def __init__(self, reward: Any):
        tower = getattr(reward, "tower", None)
        self.embed: Callable[[Tensor], Tensor] = tower.embed if isinstance(tower, ImageTower) else lambda images: images

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.embed(images).flatten(1).mean(1)


def _plannable(value: Value, prompt: str) -> Value | None:
    """Return a value that does the same work on fake tensors and keeps none of them; None for one of a user's own."""
    if isinstance(value, TweedieValue):  # the rollouts of a Monte Carlo estimate need no more than this
        return TweedieValue({name: _ImagesOnly(reward) for name, reward in value.rewards.items()}, value.weights)
    if not isinstance(value, StitchedValue):
        return None
    for model in value.models.values():
        if isinstance(model.readout, TextTower):
            model.readout.embed([prompt])  # keeps what it has embedded, which must not be a fake tensor
    return value


def step_bytes(denoiser: Denoiser, method: str, value: Value, size: int, step: int) -> int:
    """Return the peak bytes, beside the weights, of `size` latents in a step by `method` and in the final decoding.

    The sampler's own code runs on fake tensors, which have shapes but no contents: nothing is computed or allocated.
    Rewards that are a user's own code do not count.
    """
    part, generator = replace(denoiser.part(range(1)), micro_batch=size), denoiser.generator
    sigma = part.sigmas[step]

    def middle() -> Tensor:
        known = value.gradient(part, latents, step)[2] if method == "dps" else value.measure(part, latents, step)[1]
        return part.velocity(latents, sigma, known)

    with FakeTensorMode(allow_non_fake_inputs=True):
        latents = torch.zeros(size, *generator.latent_shape, device=generator.device)
        with torch.no_grad():
            calls = (middle, lambda: value.measure(part, latents, part.steps), lambda: generator.decode(latents))
            return max(peak_of_created(call) for call in calls)


def planned_micro_batch(
    denoiser: Denoiser, method: str, value: Value, settings: Settings, *, kept: int, free: float
) -> int:
    """Return the largest power of two, at most MOST, of latents that need at most `free` bytes beside the weights.

    `kept` are the bytes that one candidate takes outside the micro batch. What a micro batch needs is proportional to
    its size. Raises InputError where not even one latent fits.
    """
    planned = _plannable(value, denoiser.prompts[0])
    if planned is None:
        return 1
    window = settings.dps.window if method == "dps" else []
    each = step_bytes(denoiser, method, planned, 1, window[0] if window else denoiser.steps // 2)
    particles, proposals = settings.particles(method), settings.proposals(method)
    fitting, size = 0, 1
    while size <= MOST and size * each + max(particles, size) * proposals * kept <= free:
        fitting, size = size, 2 * size
    if fitting:
        return fitting
    raise InputError(
        f"one latent of {method} needs {(each + particles * proposals * kept) / GIB:.1f} GiB beside the networks, "
        f"{free / GIB:.1f} GiB are free: use a smaller resolution, fewer particles, guidance=1, or a stitched value "
        "model instead of images"
    )


def fit_micro_batch(denoiser: Denoiser, method: str, value: Value, settings: Settings, kept: int) -> Denoiser:
    """Return the denoiser with the micro batch of the settings or, where they leave it open, of the device's memory."""
    if settings.micro_batch is not None:
        return denoiser
    device = denoiser.generator.device
    if device.type == "cpu":
        return replace(denoiser, micro_batch=MOST)
    free = SHARE * free_memory(device)
    return replace(denoiser, micro_batch=planned_micro_batch(denoiser, method, value, settings, kept=kept, free=free))


@contextmanager
def encoders_away(family: Family, pipeline: Any, device: torch.device):
    """Keep a pipeline's text encoders in the CPU's memory inside this context, where `device` is a GPU.

    Encoders that something else places, or that are quantised, stay where they are.
    """
    moved: list[tuple[Any, torch.device]] = []
    if device.type == "cuda":
        for name in family.text_parts:
            encoder: Any = getattr(pipeline, name)
            placed = hasattr(encoder, "_hf_hook") or hasattr(encoder, "hf_quantizer")
            home: Any = getattr(encoder, "device", device)
            if isinstance(encoder, torch.nn.Module) and not placed and home.type == "cuda":
                moved.append((encoder, home))
    for encoder, _ in moved:
        encoder.to("cpu")
    if moved:
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for encoder, home in moved:
            encoder.to(home)
