"""Ordinary differential equation solvers for a velocity network: pure functions, float32 state."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stitchvm_reward.transfer import to_device

SOLVERS = ("euler", "dpm2")


def euler_step(latents: Tensor, velocity: Tensor, sigma: float, following: float) -> Tensor:
    """One first-order step from level `sigma` to level `following`."""
    return latents + (following - sigma) * velocity


def dpm2_step(
    latents: Tensor, clean: Tensor, previous: Tensor | None, sigmas: tuple[float | None, float, float]
) -> Tensor:
    """One multistep DPM-Solver++(2M) step (arXiv 2211.01095, algorithm 2) on data predictions.

    `sigmas` are the levels of the previous, this and the next step, `previous` the clean latent predicted at the
    previous one. With alpha = 1 - sigma and lambda = log(alpha / sigma). First order where `previous` is None.
    """
    before, sigma, following = sigmas
    if previous is not None and before is not None and following > 0:
        width = _log_ratio(following) - _log_ratio(sigma)
        past = _log_ratio(sigma) - _log_ratio(before)
        clean = clean + (clean - previous) * (width / (2 * past))
    ratio = following / sigma
    return ratio * latents + ((1 - following) - ratio * (1 - sigma)) * clean


def sde_step(
    latents: Tensor, clean: Tensor, noise: Tensor, sigma: float, following: float, *, stochasticity: float = 1.0
) -> Tensor:
    """One stochastic step from t = `sigma` to s = `following` < t, exact for a constant z_0 = `clean`.

    Every SDE dz = (u - nu^2 / 2 score) dt + nu dW keeps the marginals. With nu^2 = 2 e t / (1 - t), where e is the
    `stochasticity`, what is not z_0 shrinks by (s / t) rho^e, rho = s (1 - t) / (t (1 - s)); noise fills it up:
    z_s = (1 - s) z_0 + s (rho^e (z_t - (1 - t) z_0) / t + sqrt(1 - rho^(2 e)) noise).

    Finite from t = 1, where rho = 0, down to s = 0, where it returns `clean`. e = 0 is Euler's step, e = 1 a draw from
    q(z_s | z_t, z_0), e = 2 the nu^2 = 4 t / (1 - t) that Stitched Value Model prints (arXiv 2605.19804, D.2).
    """
    rho = following * (1 - sigma) / (sigma * (1 - following))
    kept = rho**stochasticity
    left = kept / sigma * (latents - (1 - sigma) * clean) + math.sqrt(1 - kept**2) * noise
    return (1 - following) * clean + following * left


def _log_ratio(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


def solve(
    velocity: Callable[[Tensor, float], Tensor],
    latents: Tensor,
    sigmas: list[float],
    solver: str = "euler",
    stop: int | None = None,
) -> Tensor:
    """Run `solver` down the levels and return the float32 latents at sigmas[stop] (default: the last level).

    `velocity(latents, sigma)` gives the network's velocity at one level. The solver's first step, and the last
    one onto level 0, are first order. Raises ValueError for an unknown solver.
    """
    steps = len(sigmas) - 1 if stop is None else stop
    return solve_each(lambda z, sigma, _: velocity(z, sigma), latents, sigmas, solver, [steps] * len(latents))


def _arrivals(stops: list[int], steps: int, device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
    """Return, for each step before which samples have arrived, which places of the batch go on and their samples.

    All of it is on the device before the first step: sent later, it would let the device wait for the CPU.
    """
    rows, arrivals = list(range(len(stops))), {}
    for step in range(steps):
        kept = [place for place, row in enumerate(rows) if stops[row] > step]
        if len(kept) < len(rows):
            rows = [rows[place] for place in kept]
            places, samples = (torch.tensor(indices, dtype=torch.long) for indices in (kept, rows))
            arrivals[step] = to_device(places, device), to_device(samples, device)
    return arrivals


def solve_each(
    velocity: Callable[[Tensor, float, Tensor], Tensor],
    latents: Tensor,
    sigmas: list[float],
    solver: str,
    stops: list[int],
) -> Tensor:
    """As `solve`, each sample down to its own level sigmas[stops[n]]; a sample that has arrived is not run on.

    `velocity(latents, sigma, rows)` is asked for the samples `rows`, (batch,) indices, that are still on their way.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    latents, rows = latents.float(), torch.arange(len(latents), device=latents.device)
    arrivals = _arrivals(stops, len(sigmas) - 1, latents.device)
    arrived, before, previous = latents.clone(), None, None
    for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        if step in arrivals:
            arrived[rows] = latents
            kept, rows = arrivals[step]
            latents, previous = latents[kept], None if previous is None else previous[kept]
        if not len(rows):
            break
        predicted = velocity(latents, sigma, rows).float()
        if solver == "euler":
            latents = euler_step(latents, predicted, sigma, following)
        else:
            clean = latents - sigma * predicted
            latents = dpm2_step(latents, clean, previous, (before, sigma, following))
            before, previous = sigma, clean
    arrived[rows] = latents
    return arrived
