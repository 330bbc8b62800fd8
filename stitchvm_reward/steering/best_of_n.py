"""Best of N: sample several times per prompt and keep the best."""

from dataclasses import replace

import torch

from stitchvm_reward.steering.denoiser import Denoiser
from stitchvm_reward.steering.settings import BestOfN
from stitchvm_reward.steering.trace import Event, Steered
from stitchvm_reward.steering.values import Value


def best_of_n(denoiser: Denoiser, value: Value, settings: BestOfN, progress=iter) -> Steered:
    """Sample settings.particles per prompt and value them at the end.

    With prune_at, only the best sample after that many steps is finished. `progress` wraps the steps.
    """
    particles, trace = denoiser.start(settings.particles), []
    prompts = len(denoiser.prompts)
    for step in progress(range(denoiser.steps)):
        velocity = denoiser.velocity(particles.latents, denoiser.sigmas[step], particles.known)
        particles = denoiser.advance(particles, velocity, step)
        if step + 1 == settings.prune_at:
            values, known = value.measure(denoiser, particles.latents, step + 1)
            values = values.view(prompts, -1)
            best = values.argmax(1) + torch.arange(prompts, device=values.device) * values.shape[1]
            particles = replace(particles, known=known).select(best)
            trace.append(Event(step + 1, denoiser.sigmas[step + 1], values.cpu()))
    values = value.measure(denoiser, particles.latents, denoiser.steps)[0].view(prompts, -1).cpu()
    weights = torch.full_like(values, 1 / values.shape[1])
    return Steered(particles.latents.unflatten(0, (prompts, -1)), values, weights, trace)
