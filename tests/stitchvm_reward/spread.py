"""Moments of the stochastic chain on normally distributed data with the exact velocity, without sampling.

python -m tests.stitchvm_reward.spread prints the table of BENCHMARKS.md.
"""

import math

import torch

from stitchvm_reward.diffusion.solvers import sde2_step
from stitchvm_reward.families.sd3 import static_levels

SHIFT = 3.0


def gain(sigma: float, std: float) -> float:
    """E[z_0 | z_t] = mean + gain (z_t - (1 - t) mean)."""
    return (1 - sigma) * std**2 / ((1 - sigma) ** 2 * std**2 + sigma**2)


def moments(
    sigmas: list[float], mean: float, std: float, *, stochasticity: float = 1.0, order: int = 1, most: float = 0.5
) -> tuple[float, float]:
    """Return mean and standard deviation at the last level, of data from N(mean, std^2).

    A step is affine in the latent, the previous prediction and the noise, so that four calls of it give its
    coefficients, with which the mean and the covariance of latent and previous prediction are propagated.
    """
    means, covariance = torch.zeros(2).double(), torch.diag(torch.tensor([1.0, 0.0]).double())
    before: float | None = None
    for sigma, following in zip(sigmas, sigmas[1:]):
        slope = gain(sigma, std)
        base = mean * (1 - slope * (1 - sigma))
        latent, previous, noise = torch.eye(3, 4).double()  # the last column: nothing but the constant
        clean = base + slope * latent
        moved = sde2_step(
            latent,
            clean,
            previous if order == 2 and before is not None else None,
            noise,
            (before, sigma, following),
            stochasticity=stochasticity,
            most=most,
        )
        constant = moved[3]
        into = torch.stack([moved[:2] - constant, torch.tensor([slope, 0.0]).double()])
        means = into @ means + torch.stack([constant, torch.tensor(base).double()])
        covariance = into @ covariance @ into.T
        covariance[0, 0] += (moved[2] - constant) ** 2
        before = sigma
    return float(means[0]), math.sqrt(float(covariance[0, 0]))


def shares(count: int, std: float, stochasticity: float) -> list[float]:
    """Return the spread after `count` steps over that of N(0.7, std^2): first order, second order, and unbounded."""
    sigmas = static_levels(count, SHIFT)
    kinds = ((1, 0.5), (2, 0.5), (2, math.inf))
    return [
        moments(sigmas, 0.7, std, stochasticity=stochasticity, order=order, most=most)[1] / std for order, most in kinds
    ]


def table(counts: tuple[int, ...] = (8, 12, 40, 100)) -> str:
    """Return `shares` for several numbers of steps, data and stochasticities, as Markdown."""
    lines = ["| data, e | " + " | ".join(f"{count} steps" for count in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for std in (0.5, 0.2):
        for e in (0.0, 1.0, 2.0):
            cells = [" / ".join(f"{share:.3f}" for share in shares(count, std, e)) for count in counts]
            lines.append(f"| N(0.7, {std}²), {e:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
