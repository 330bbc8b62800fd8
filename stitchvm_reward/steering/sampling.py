"""Steered sampling: of prompts under a denoiser, and of a diffusers pipeline."""

import os
from typing import Any

import torch
from tqdm import tqdm

from stitchvm_reward.diffusion.generator import Conditions, Generator
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards import Reward
from stitchvm_reward.steering.best_of_n import best_of_n
from stitchvm_reward.steering.denoiser import Denoiser
from stitchvm_reward.steering.dps import dps
from stitchvm_reward.steering.fk import fk
from stitchvm_reward.steering.settings import Settings
from stitchvm_reward.steering.trace import Steered
from stitchvm_reward.steering.values import StitchedValue, TweedieValue, Value
from stitchvm_reward.stitching.value_model import StitchedValueModel

T5_LENGTH = 256  # tokens that a Stable Diffusion 3 pipeline reads unless told otherwise
GIB = 2**30
ALIKE = 0.02  # null text kept in half precision is off by up to 1/256 of itself


def steer_prompts(denoiser: Denoiser, method: str, value: Value, settings: Settings, bar: tqdm) -> list[Steered]:
    """Steer the denoiser's prompts by a method of METHODS, as many at once as fill a micro batch.

    `bar` is moved on after every step of each of these waves and shows the mean value of the chosen so far; `waves`
    tells how many there are. Raises InputError for settings that do not fit, and where memory or numbers run out.
    """
    settings.require_method(method)
    size, found, total = wave(method, settings), [], 0.0

    def told(steps):
        for step in steps:
            yield step
            bar.update()

    for start in range(0, len(denoiser.prompts), size):
        part = denoiser.part(range(start, min(start + size, len(denoiser.prompts))))
        try:
            with torch.no_grad():
                if method == "best_of_n":
                    steered = best_of_n(part, value, settings.best_of_n, told)
                elif method == "fk":
                    steered = fk(part, value, settings.fk, told)
                else:
                    steered = dps(part, value, settings.dps, told)
        except torch.OutOfMemoryError:
            raise InputError(
                f"the device ran out of memory with micro_batch={settings.micro_batch} and "
                f"{settings.particles(method)} particles: lower them"
            ) from None
        total += float(steered.values.amax(1).sum())
        found.append(steered)
        bar.set_postfix(value=f"{total / min(start + size, len(denoiser.prompts)):.3f}")
    return found


def wave(method: str, settings: Settings) -> int:
    """Prompts that are steered at once."""
    return max(1, settings.micro_batch // settings.particles(method))


def waves(count: int, method: str, settings: Settings) -> int:
    """How many times so many prompts need a solver's run."""
    return -(-count // wave(method, settings))


def progress_bar(count: int, method: str, settings: Settings) -> tqdm:
    """A bar for `steer_prompts`."""
    total = waves(count, method, settings) * settings.steps
    return tqdm(total=total, desc=f"steer {method}", leave=False, dynamic_ncols=True)


def require_memory(method: str, settings: Settings, latent_bytes: int, kept_bytes: int, free: int) -> None:
    """Raise InputError where the particles of one prompt need more than the `free` bytes beside the network's own.

    A candidate is a latent in float32 in a few copies, and what is kept of its next forward pass.
    """
    proposals = settings.fk.proposals if method == "fk" else 1
    particles = settings.particles(method)
    needed = max(particles, settings.micro_batch) * proposals * (4 * latent_bytes + kept_bytes)
    if needed > free:
        each = f" of {proposals} proposals" if proposals > 1 else ""
        raise InputError(
            f"{particles} particles{each} must fit into memory: they need {needed / GIB:.1f} GiB beside the network, "
            f"{free / GIB:.1f} are free; take fewer particles, or a smaller micro_batch"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device at hand."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def make_denoiser(
    generator: Generator,
    prompts: list[str],
    conditions: Conditions,
    negative: Conditions,
    value: Value,
    settings: Settings,
) -> Denoiser:
    """The denoiser of some prompts, of `conditions` (one row each), under guidance from `negative` (one row).

    Where a value model on the generator's own network reads null text that is `negative` but for rounding, both take
    the value model's, so that they share its blocks.
    """
    null_text = False
    for model in value.models.values() if isinstance(value, StitchedValue) else ():
        null = model.null
        if model.backbone.network is generator.transformer and alike(null, negative):
            negative, null_text = null, True
            break
    return Denoiser(
        generator,
        prompts,
        list(range(len(prompts))),
        conditions,
        negative if settings.guidance > 1 else None,
        null_text,
        settings.guidance,
        settings.steps,
        settings.stochasticity,
        settings.micro_batch,
        settings.seed,
    )


def alike(first: Conditions, second: Conditions) -> bool:
    """Whether two conditions are the same but for the rounding of their number formats."""
    pairs = ((first.tokens, second.tokens), (first.pooled, second.pooled))
    return all(
        a is b or (a.shape == b.shape and float((a.float() - b.float()).norm() / b.float().norm()) < ALIKE)
        for a, b in pairs
    )


def as_value(value: Any) -> Value:
    """What `steer` was given as a Value: a stitched value model, several by name, or a reward of images.

    Raises InputError for anything else.
    """
    if isinstance(value, Value):
        return value
    if isinstance(value, StitchedValueModel):
        return StitchedValue({"value": value}, {"value": 1.0})
    if isinstance(value, dict) and value and all(isinstance(model, StitchedValueModel) for model in value.values()):
        return StitchedValue(value, dict.fromkeys(value, 1.0))
    if callable(getattr(value, "score", None)):
        reward: Reward = value
        return TweedieValue({"reward": reward}, {"reward": 1.0})
    raise InputError(
        "value must be a StitchedValueModel, a dict of them, a reward with score(images, prompts), or a Value, got "
        f"{type(value).__name__}"
    )
