"""Feynman-Kac steering: particles on the generator's own chain, resampled by their values on the way."""

from dataclasses import replace

import torch
from torch import Tensor

from stitchvm_reward.errors import InputError
from stitchvm_reward.runs import randomness
from stitchvm_reward.steering.denoiser import Denoiser
from stitchvm_reward.steering.settings import FeynmanKac
from stitchvm_reward.steering.trace import Event, Steered
from stitchvm_reward.steering.values import Value


def normalised(log_weights: Tensor) -> Tensor:
    """Return weights (prompts, particles) float64 that sum to 1, for log weights of any size."""
    return torch.softmax(log_weights.double(), 1)


def effective_size(weights: Tensor) -> Tensor:
    """Return the effective sample size (prompts,) of normalised weights, from 1 to the number of particles."""
    return 1 / weights.square().sum(1)


def tempered_share(log_weights: Tensor, least: float, halvings: int = 50) -> Tensor:
    """Return the largest shares s (prompts, 1) float64 in [0, 1] whose weights keep an effective sample size.

    The weights are exp(s log_weights), normalised, for log weights (prompts, particles); their effective sample size
    falls as s rises and is at least `least` particles. s is 1 where all of the weights keep it, else found by bisection
    from below (the temperature of an annealed step: Jasra et al. 2011, Scandinavian Journal of Statistics 38).
    """

    def enough(shares: Tensor) -> Tensor:
        return effective_size(normalised(shares * log_weights))[:, None] >= least

    high = torch.ones(len(log_weights), 1, dtype=torch.float64)
    whole, low = enough(high), torch.zeros_like(high)
    for _ in range(halvings):
        middle = (low + high) / 2
        fits = enough(middle)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(whole, 1.0, low)


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

    With settings.least_ess, the weights are exp(s lambda (V(new) - V(old))) with a share s per prompt from
    `tempered_share`, and V(old) + s (V(new) - V(old)) is what the next resampling takes for V(old). So the rest of the
    weights is not lost: the next resampling, or the final weights, hold it, and the product above stays the same.

    Raises InputError if a value is not finite.
    """
    particles, trace = denoiser.start(settings.particles), []
    prompts, device = len(denoiser.prompts), particles.latents.device
    weighed = torch.zeros(prompts, settings.particles, dtype=torch.float64)
    for step in progress(range(denoiser.steps)):
        velocity = denoiser.velocity(particles.latents, denoiser.sigmas[step], particles.known)
        several = step + 1 in settings.proposing(denoiser.steps)
        particles, values = denoiser.advance(particles, velocity, step, settings.proposals if several else 1), None
        if several:
            values, known = value.measure(denoiser, particles.latents, step + 1)
            best = values.view(-1, settings.proposals).argmax(1)
            best += torch.arange(len(best), device=device) * settings.proposals
            particles, values = replace(particles, known=known).select(best), values[best]
        if step + 1 in settings.resampled():
            if values is None:
                values, known = value.measure(denoiser, particles.latents, step + 1)
                particles = replace(particles, known=known)
            now = _finite(values.view(prompts, -1), step + 1)
            gained = settings.temperature * (now - weighed)
            share = tempered_share(gained, settings.least_ess * settings.particles)
            weights = normalised(share * gained)
            each = 1 if settings.resampling == "systematic" else settings.particles
            ancestors = resample(weights, _uniforms(denoiser, step, each))
            rows = (ancestors + torch.arange(prompts)[:, None] * settings.particles).flatten().to(device)
            particles, weighed = particles.select(rows), torch.lerp(weighed, now, share).gather(1, ancestors)
            trace.append(Event(step + 1, denoiser.sigmas[step + 1], now, effective_size(weights), ancestors))
    values = value.measure(denoiser, particles.latents, denoiser.steps)[0]
    now = _finite(values.view(prompts, -1), denoiser.steps)
    weights = normalised(settings.temperature * (now - weighed))
    return Steered(particles.latents.unflatten(0, (prompts, -1)), now.float(), weights, trace)


def _finite(values: Tensor, step: int) -> Tensor:
    """Return the values in float64 on the CPU. Raises InputError if one is not finite."""
    values = values.double().cpu()
    if not values.isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise InputError(
            f"{bad} of {values.numel()} values after {step} steps are not finite: particles cannot be weighted"
        )
    return values
