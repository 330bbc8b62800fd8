"""Guidance by the gradient of a value: diffusion posterior sampling."""

import torch

from stitchvm_reward.errors import InputError
from stitchvm_reward.steering.denoiser import Denoiser, Known
from stitchvm_reward.steering.settings import Guidance
from stitchvm_reward.steering.trace import Event, Steered
from stitchvm_reward.steering.values import Value


def strength_at(settings: Guidance, step: int, sigmas: list[float]) -> float:
    """Return c_t of a step; see `Guidance`."""
    window = settings.window or [0, len(sigmas)]
    if not window[0] <= step <= window[1]:
        return 0.0
    if settings.schedule == "constant":
        return settings.strength
    if settings.schedule == "sigma":
        return settings.strength * sigmas[step]
    return settings.strength * sigmas[step] / (1 - min(sigmas[step], sigmas[1]))


def dps(denoiser: Denoiser, value: Value, settings: Guidance, progress=iter) -> Steered:
    """Sample with velocity u - c_t grad V(z_t); as t decreases, this ascends V (Stitched Value Model, 2605.19804, C.2).

    With Tweedie's value, the gradient passes through the generator, the decoder and the reward (DPS, arXiv
    2209.14687). With a stitched value, it passes through the value model alone, and the value model's blocks begin the
    velocity's pass if they are the generator's own. Steps of second order extrapolate the prediction with the term: it
    belongs to the velocity that is integrated, and the particle has moved along it. `progress` wraps the steps.

    Raises InputError if the latents do not stay finite.
    """
    particles, trace, sigmas = denoiser.start(1), [], denoiser.sigmas
    finite = []
    for step in progress(range(denoiser.steps)):
        scale, known = strength_at(settings, step, sigmas), Known()
        if scale:
            values, slope, known = value.gradient(denoiser, particles.latents, step)
            trace.append((step, values))
        velocity = denoiser.velocity(particles.latents, sigmas[step], known)
        if scale:
            velocity = velocity - scale * slope
        particles = denoiser.advance(particles, velocity, step)
        finite.append(particles.latents.isfinite().all())
    whole = torch.stack(finite)
    if not whole.all():
        first = int((~whole).int().argmax()) + 1
        raise InputError(
            f"the latents are not finite after step {first} of {denoiser.steps}: "
            f"lower dps.strength, which is {settings.strength:g}"
        )
    values = value.measure(denoiser, particles.latents, denoiser.steps)[0].view(-1, 1).cpu()
    events = [Event(step, sigmas[step], seen.view(-1, 1).cpu()) for step, seen in trace]
    return Steered(particles.latents[:, None], values, torch.ones_like(values), events)
