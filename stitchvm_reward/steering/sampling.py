"""Steered sampling of prompts under a denoiser, and the memory that it needs."""

import copy
import math
from typing import Any

import torch
from tqdm import tqdm

from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.errors import InputError
from stitchvm_reward.families.family import Architecture, Conditions
from stitchvm_reward.rewards import Reward
from stitchvm_reward.steering.best_of_n import best_of_n
from stitchvm_reward.steering.denoiser import Denoiser
from stitchvm_reward.steering.dps import dps
from stitchvm_reward.steering.fk import fk
from stitchvm_reward.steering.memory import GIB, fit_micro_batch
from stitchvm_reward.steering.settings import Settings
from stitchvm_reward.steering.trace import Steered
from stitchvm_reward.steering.values import StitchedValue, TweedieValue, Value
from stitchvm_reward.stitching.value_model import StitchedValueModel

TOLERANCE = 0.02  # conditions of the empty prompt that were stored in half precision are off by up to 1/256


def steer_prompts(denoiser: Denoiser, method: str, value: Value, settings: Settings, bar: tqdm) -> list[Steered]:
    """Steer the denoiser's prompts by a method of METHODS, in waves of as many prompts as fill a micro batch.

    `bar` advances after every solver step of each wave and shows the mean value of the samples chosen so far. Raises
    InputError for settings that do not fit, and where memory runs out or values are not finite.
    """
    settings.require_method(method)
    size, results, total = prompts_per_wave(denoiser, method, settings), [], 0.0

    def progress(steps):
        for step in steps:
            yield step
            bar.update()

    for start in range(0, len(denoiser.prompts), size):
        part = denoiser.part(range(start, min(start + size, len(denoiser.prompts))))
        try:
            with torch.no_grad():
                if method == "best_of_n":
                    steered = best_of_n(part, value, settings.best_of_n, progress)
                elif method == "fk":
                    steered = fk(part, value, settings.fk, progress)
                else:
                    steered = dps(part, value, settings.dps, progress)
        except torch.OutOfMemoryError:
            raise InputError(
                f"the device ran out of memory with micro_batch={denoiser.micro_batch} and "
                f"{settings.particles(method)} particles: lower them"
            ) from None
        total += float(steered.values.amax(1).sum())
        results.append(steered)
        bar.set_postfix(value=f"{total / min(start + size, len(denoiser.prompts)):.3f}")
    return results


def prompts_per_wave(denoiser: Denoiser, method: str, settings: Settings) -> int:
    """Return the number of prompts that are steered at once."""
    return max(1, denoiser.micro_batch // settings.particles(method))


def progress_bar(denoiser: Denoiser, method: str, settings: Settings) -> tqdm:
    """Return a progress bar for `steer_prompts`."""
    waves = -(-len(denoiser.prompts) // prompts_per_wave(denoiser, method, settings))
    return tqdm(total=waves * settings.steps, desc=f"steer {method}", leave=False, dynamic_ncols=True)


def candidate_bytes(architecture: Architecture, resolution: int, text_length: int, dtype: torch.dtype) -> int:
    """Return the bytes that a candidate keeps beside a micro batch: a few float32 copies of its latent, and the tokens
    of its next forward pass."""
    tokens, width = architecture.family.sequence(architecture, resolution, text_length)
    return 6 * 4 * math.prod(architecture.latent_shape(resolution)) + tokens * width * dtype.itemsize


def require_memory(method: str, settings: Settings, each: int, free: int) -> None:
    """Raise InputError if the candidates of one prompt, of `each` bytes, need more than `free` beside the network."""
    proposals, particles = settings.proposals(method), settings.particles(method)
    needed = max(particles, settings.micro_batch or 1) * proposals * each
    if needed > free:
        of = f" of {proposals} proposals" if proposals > 1 else ""
        raise InputError(
            f"{particles} particles{of} must fit into memory: they need {needed / GIB:.1f} GiB beside the network, "
            f"{free / GIB:.1f} GiB are free; use fewer particles or a smaller micro_batch"
        )


def make_denoiser(
    generator: Generator,
    prompts: list[str],
    conditions: Conditions,
    negative: Conditions,
    *,
    value: Value,
    settings: Settings,
    method: str | None = None,
    kept: int = 0,
) -> Denoiser:
    """Return the denoiser of some prompts, with `conditions` (one row each), guided away from `negative` (one row).

    A guidance-distilled generator reads settings.guidance as an input and has no unguided branch: `negative` is not
    used. For other generators, settings.guidance is the scale of classifier-free guidance. If a value model runs on
    the generator's own network and its empty prompt equals `negative` up to rounding, both branches read the value
    model's conditions, so that they share its blocks. If the settings leave the micro batch open, it is planned for
    `method`, whose candidates take `kept` bytes each (see `fit_micro_batch`), and is 1 where no method is named.
    """
    distilled, null_text = generator.guidance is not None, False
    if distilled:
        generator = copy.copy(generator)
        generator.guidance = settings.guidance
    for model in value.models.values() if isinstance(value, StitchedValue) and not distilled else ():
        if model.backbone.network is generator.transformer and nearly_equal(model.null, negative):
            negative, null_text = model.null, True
            break
    denoiser = Denoiser(
        generator=generator,
        prompts=prompts,
        numbers=list(range(len(prompts))),
        conditions=conditions,
        negative=negative if settings.guidance > 1 and not distilled else None,
        null_text=null_text,
        guidance=settings.guidance,
        steps=settings.steps,
        stochasticity=settings.stochasticity,
        order=settings.order,
        micro_batch=settings.micro_batch or 1,
        seed=settings.seed,
    )
    return denoiser if method is None else fit_micro_batch(denoiser, method, value, settings, kept)


def nearly_equal(first: Conditions, second: Conditions) -> bool:
    """Return whether two conditions are equal up to the rounding of their number formats."""
    if first.key() != second.key():
        return False
    pairs = ((first[name], second[name]) for name in first.tensors)
    return all(a is b or float((a.float() - b.float()).norm() / b.float().norm()) < TOLERANCE for a, b in pairs)


def as_value(value: Any) -> Value:
    """Return what `steer` was given as a Value: a stitched value model, several by name, or a reward of images.

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
