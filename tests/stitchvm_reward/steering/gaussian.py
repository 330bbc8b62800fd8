"""A generator whose samples are known in closed form: one number a latent, normally distributed."""

from dataclasses import replace

import torch

from stitchvm_reward.families.family import Conditions
from stitchvm_reward.families.sd3 import static_levels
from stitchvm_reward.steering.denoiser import Denoiser, Known
from stitchvm_reward.steering.values import Value

MEAN, SPREAD = 0.4, 0.7


def clean_mean(latents, sigma):
    """E[z_0 | z_t] of the normal distribution."""
    gain = (1 - sigma) * SPREAD**2 / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
    return MEAN + gain * (latents - (1 - sigma) * MEAN)


class GaussianGenerator:
    """What `Denoiser` asks of a generator; its velocity is exact."""

    latent_shape, device, transformer, guidance = (1, 1, 1), torch.device("cpu"), None, None

    def sigmas(self, steps):
        return static_levels(steps, 3.0)

    def velocity(self, latents, sigma, conditions):
        level = sigma.view(-1, 1, 1, 1)
        return (latents - clean_mean(latents, level)) / level


class Parabola(Value):
    """r(x) = -(x - centre)^2 / 2 of the latent, or before the end of its denoised mean."""

    def __init__(self, centre=1.5):
        self.centre = centre

    def one(self, denoiser, latents, rows, count, step):
        sigma = denoiser.sigmas[step]
        clean = clean_mean(latents, sigma) if sigma else latents
        return -0.5 * (clean.flatten() - self.centre).square(), Known()


class Slope(Value):
    """log E[exp(b x) | z_t] but for what does not depend on z_t: b times the denoised mean."""

    def __init__(self, rise):
        self.rise = rise

    def one(self, denoiser, latents, rows, count, step):
        sigma = denoiser.sigmas[step]
        return self.rise * (clean_mean(latents, sigma) if sigma else latents).flatten(), Known()


def gaussian_denoiser(prompts: int, steps: int, **changes) -> Denoiser:
    nothing = Conditions({"tokens": torch.zeros(prompts, 1, 1), "pooled": torch.zeros(prompts, 1)})
    names = [f"prompt {number}" for number in range(prompts)]
    generator = GaussianGenerator()
    made = Denoiser(
        generator=generator,
        prompts=names,
        numbers=list(range(prompts)),
        conditions=nothing,
        negative=None,
        null_text=False,
        guidance=1.0,
        steps=steps,
        stochasticity=1.0,
        micro_batch=1 << 20,
        seed=0,
    )
    return replace(made, **changes)


def chain_moments(denoiser: Denoiser) -> tuple[float, float]:
    """Mean and variance at level 0 of the denoiser's own chain, whose steps are finite, in closed form."""
    mean, variance, sigmas = 0.0, 1.0, denoiser.sigmas
    for t, s in zip(sigmas, sigmas[1:]):
        gain = (1 - t) * SPREAD**2 / ((1 - t) ** 2 * SPREAD**2 + t**2)
        base = MEAN * (1 - gain * (1 - t))  # the clean mean is base + gain z
        kept = (s * (1 - t) / (t * (1 - s))) ** denoiser.stochasticity
        factor = (1 - s) * gain + s * kept / t * (1 - (1 - t) * gain)
        mean = factor * mean + base * ((1 - s) - s * kept / t * (1 - t))
        variance = factor**2 * variance + s**2 * (1 - kept**2)
    return mean, variance
