"""The flow-matching path and its continuation from a stopped latent: pure functions of noise levels.

Levels run from t = 0 (clean) to t = 1 (noise); z_t = (1 - t) z_0 + t eps and the velocity is u = eps - z_0
(Stitched Value Model, arXiv 2605.19804). An anchor is the latent z_tau at which a rollout was stopped;
tau = 0 makes every formula here the plain one.
"""

import torch
from torch import Tensor


def bridge(t: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (abar, sbar) of z_t = abar z_tau + sbar eps for t > tau (Stitched Value Model, C.4).

    abar = (1 - t) / (1 - tau) and sbar^2 = (t - tau)(t + tau - 2 t tau) / (1 - tau)^2; any broadcastable shapes.
    """
    abar = (1 - t) / (1 - tau)
    variance = (t - tau) * (t + tau - 2 * t * tau) / (1 - tau).square()
    return abar, variance.sqrt()


def anchor_coefficients(t: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (A, B) of the anchor estimate a = A z_t - B u, finite for every t >= tau, t > 0.

    They follow from eliminating eps between z_t = abar a + sbar eps and u = abar' a + sbar' eps. At tau = 0 the
    estimate is the denoised latent z_t - t u.
    """
    scale = t * (1 - tau)
    return (t * (1 - 2 * tau) + tau.square()) / scale, (t - tau) * (t + tau - 2 * t * tau) / scale


def bridge_velocity(anchor: Tensor, noise: Tensor, t: Tensor, tau: Tensor) -> Tensor:
    """Conditional velocity abar' a + sbar' eps along the bridge (Stitched Value Model, C.4, eq. 77).

    Unbiased for the marginal velocity, with a variance that grows without bound as t approaches tau.
    """
    slope = -1 / (1 - tau)
    _, sbar = bridge(t, tau)
    variance_slope = ((t + tau - 2 * t * tau) + (t - tau) * (1 - 2 * tau)) / (1 - tau).square()
    return slope * anchor + variance_slope / (2 * sbar) * noise


def noised(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) z_0 + t eps of (batch, ...) tensors at levels t, (batch,)."""
    return torch.lerp(clean, noise, per_sample(t, clean))


def denoised(latents: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Tweedie's estimate of the clean latent, z_t - t u."""
    return latents - t * velocity


def score(latents: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """Gradient of the log density at level t, -((1 - t) u + z_t) / t."""
    return -((1 - t) * velocity + latents) / t


def per_sample(levels: Tensor, like: Tensor) -> Tensor:
    """Reshape (batch,) levels so that they broadcast over `like`, (batch, ...), in float32."""
    return levels.to(like.device, torch.float32).view(-1, *[1] * (like.ndim - 1))
