"""A generator whose samples are known in closed form: one number a latent, normally distributed."""

from dataclasses import replace

import torch

from stitchvm_reward.families.family import Conditions
from stitchvm_reward.families.sd3 import static_levels
from stitchvm_reward.steering.denoiser import Denoiser, Known
from stitchvm_reward.steering.values import Value
from tests.stitchvm_reward.spread import gain, moments

MEAN, SPREAD = 0.4, 0.7


def clean_mean(latents, sigma):
    """E[z_0 | z_t] of the normal distribution."""
    return MEAN + gain(sigma, SPREAD) * (latents - (1 - sigma) * MEAN)


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
        order=1,
        micro_batch=1 << 20,
        seed=0,
    )
    return replace(made, **changes)


def chain_moments(denoiser: Denoiser) -> tuple[float, float]:
    """Mean and variance at level 0 of the denoiser's own chain, whose steps are finite."""
    mean, std = moments(denoiser.sigmas, MEAN, SPREAD, stochasticity=denoiser.stochasticity, order=denoiser.order)
    return mean, std**2
