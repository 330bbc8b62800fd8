"""Feynman-Kac steering: particles on the generator's own chain, resampled by their values on the way."""

import torch
from torch import Tensor

from stitchvm_reward.errors import InputError
from stitchvm_reward.runs import randomness
from stitchvm_reward.steering.denoiser import Denoiser, Known
from stitchvm_reward.steering.settings import FeynmanKac
from stitchvm_reward.steering.trace import Event, Steered
from stitchvm_reward.steering.values import Value


def normalised(log_weights: Tensor) -> Tensor:
    """Return weights (prompts, particles) float64 that sum to 1, for log weights of any size."""
    return torch.softmax(log_weights.double(), 1)


def effective_size(weights: Tensor) -> Tensor:
    """Return the effective sample size (prompts,) of normalised weights, from 1 to the number of particles."""
    return 1 / weights.square().sum(1)


def resample(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return ancestors (prompts, particles), in ascending order, for normalised weights (prompts, particles) float64.

    `uniforms` in [0, 1) are (prompts, 1) for systematic resampling and (prompts, particles) for multinomial resampling.
    Both draw particle n on average N w_n times. Systematic resampling draws it N w_n times rounded down or up, so each
    particle once if all weights are equal.
    """
    count = weights.shape[1]
    if uniforms.shape[1] == 1:
        points = (torch.arange(count, dtype=torch.float64) + uniforms) / count
    else:
        points = uniforms.sort(1).values
    # Rounding may leave the last edge below 1.
    return torch.searchsorted(weights.cumsum(1), points, right=True).clamp_max(count - 1)


def _uniforms(denoiser: Denoiser, step: int, count: int) -> Tensor:
    drawn = [
        torch.rand(
            count,
            dtype=torch.float64,
            generator=randomness.at(denoiser.seed, randomness.RESAMPLING, number, step),
        )
        for number in denoiser.numbers
    ]
    return torch.stack(drawn)


def fk(denoiser: Denoiser, value: Value, settings: FeynmanKac, progress=iter) -> Steered:
    """Feynman-Kac steering (arXiv 2501.06848; Stitched Value Model, arXiv 2605.19804, C.2), prompts side by side.

    Particles make the chain's own transitions. At settings.resampled(), they are resampled with weights
    exp(lambda (V(new) - V(old))), where V(old) is their ancestors' value at the previous resampling (0 at the first).
    The product of all weights, including the final ones, is therefore exp(lambda V(end)): the weighted particles are
    samples of the generator's density times this factor. With several proposals, each particle keeps its best proposal
    in some steps, which trades this exactness for reward. `progress` wraps the steps.

    Raises InputError if a value is not finite.
    """
    latents, known, trace = denoiser.start(settings.particles), Known(), []
    prompts, device = len(denoiser.prompts), latents.device
    before = torch.zeros(prompts, settings.particles, dtype=torch.float64)
    for step in progress(range(denoiser.steps)):
        velocity = denoiser.velocity(latents, denoiser.sigmas[step], known)
        several = step + 1 in settings.proposing(denoiser.steps)
        latents, known = denoiser.advance(latents, velocity, step, settings.proposals if several else 1), Known()
        values = None
        if several:
            values, known = value.measure(denoiser, latents, step + 1)
            best = values.view(-1, settings.proposals).argmax(1)
            best += torch.arange(len(best), device=device) * settings.proposals
            latents, known, values = latents[best], known.select(best), values[best]
        if step + 1 in settings.resampled():
            if values is None:
                values, known = value.measure(denoiser, latents, step + 1)
            now = _finite(values.view(prompts, -1), step + 1)
            weights = normalised(settings.temperature * (now - before))
            each = 1 if settings.resampling == "systematic" else settings.particles
            ancestors = resample(weights, _uniforms(denoiser, step, each))
            rows = (ancestors + torch.arange(prompts)[:, None] * settings.particles).flatten().to(device)
            latents, known, before = latents[rows], known.select(rows), now.gather(1, ancestors)
            trace.append(Event(step + 1, denoiser.sigmas[step + 1], now, effective_size(weights), ancestors))
    values = value.measure(denoiser, latents, denoiser.steps)[0]
    now = _finite(values.view(prompts, -1), denoiser.steps)
    return Steered(
        latents.unflatten(0, (prompts, -1)), now.float(), normalised(settings.temperature * (now - before)), trace
    )


def _finite(values: Tensor, step: int) -> Tensor:
    """Return the values in float64 on the CPU. Raises InputError if one is not finite."""
    values = values.double().cpu()
    if not values.isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise InputError(
            f"{bad} of {values.numel()} values after {step} steps are not finite: particles cannot be weighted"
        )
    return values
