"""Noise levels and solvers against known numbers, diffusers, and an exactly solvable case."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stitchvm_reward.diffusion.solvers import dpm2_step, euler_step, extrapolated, sde2_step, sde_step, solve
from stitchvm_reward.families.sd3 import static_levels
from tests.stitchvm_reward.spread import moments, shares

TEN = "1 .960129 .913349 .857692 .790368 .707278 .602151 .464876 .278049 .008929 0"
TWENTY_FIVE = (
    "1 .985758 .970681 .954694 .93771 .919635 .900359 .879759 .857692 .833998 .808489 .780947 .751121 .718713 "
    ".683374 .644686 .602151 .555163 .502985 .444708 .379195 .305009 .220307 .12268 .008929 0"
)
DATA_STD = 0.5
SHIFT = 3.0


def gaussian_velocity(latents, t):
    """Exact velocity for data from N(0, DATA_STD^2), one dimension at a time."""
    return (t - (1 - t) * DATA_STD**2) / ((1 - t) ** 2 * DATA_STD**2 + t**2) * latents


@pytest.mark.parametrize("steps, expected", [(10, TEN), (25, TWENTY_FIVE)])
def test_schedule_has_the_known_levels(steps, expected):
    assert static_levels(steps, SHIFT) == pytest.approx([float(level) for level in expected.split()], abs=1e-6)


@pytest.mark.parametrize("shift", [3.0, 1.0, 2.5])
@pytest.mark.parametrize("steps", [2, 10, 25, 40])
def test_schedule_equals_that_of_diffusers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    assert static_levels(steps, shift) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "solver, steps, expected", [("euler", 10, 0.718), ("euler", 25, 0.887), ("dpm2", 10, 1.405), ("dpm2", 25, 1.186)]
)
def test_spread_on_gaussian_data_is_as_known(solver, steps, expected):
    # The flow is linear in the latent, so one start at 1 gives the output's standard deviation.
    reached = solve(gaussian_velocity, torch.ones(1), static_levels(steps, SHIFT), solver)
    assert reached.item() / DATA_STD == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("solver", ["euler", "dpm2"])
def test_many_steps_reach_the_true_spread(solver):
    reached = solve(gaussian_velocity, torch.ones(1), static_levels(1000, SHIFT), solver)
    assert reached.item() / DATA_STD == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("sigma, following", [(1.0, 0.9), (0.6, 0.3), (0.008929, 0.0)])
def test_dpm2_without_a_previous_prediction_is_euler(sigma, following):
    latents, velocity = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    step = dpm2_step(latents, latents - sigma * velocity, None, (None, sigma, following))
    torch.testing.assert_close(step, euler_step(latents, velocity, sigma, following), rtol=0, atol=1e-6)


def test_dpm2_is_first_order_onto_level_zero_and_after_level_one():
    latents, clean, previous = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    for sigmas in ((0.5, 0.3, 0.0), (1.0, 0.9, 0.8)):
        first_order = dpm2_step(latents, clean, None, (None, *sigmas[1:]))
        assert torch.equal(dpm2_step(latents, clean, previous, sigmas), first_order)


@pytest.mark.parametrize("solver", ["euler", "dpm2"])
def test_stop_gives_the_latent_at_its_level(solver):
    sigmas, noise, drift = static_levels(25, SHIFT), torch.tensor([0.3, -1.0]), torch.tensor([2.0, 0.5])
    for stop in (0, 1, 12, 17, 25):
        stopped = solve(lambda *_: drift, noise, sigmas, solver, stop)
        torch.testing.assert_close(stopped, noise + (sigmas[stop] - 1) * drift)


@pytest.mark.parametrize("solver", ["euler", "dpm2"])
def test_stop_runs_the_network_that_many_times(solver):
    asked = []

    def velocity(latents, sigma):
        asked.append(sigma)
        return gaussian_velocity(latents, sigma)

    sigmas = static_levels(10, SHIFT)
    stopped = solve(velocity, torch.ones(3), sigmas, solver, stop=6)
    assert asked == sigmas[:6] and torch.equal(stopped, solve(velocity, torch.ones(3), sigmas[:7], solver))


@pytest.mark.parametrize("solver", ["euler", "dpm2"])
def test_state_is_float32_whatever_the_network_gives(solver):
    reached = solve(
        lambda z, t: gaussian_velocity(z, t).bfloat16(), torch.ones(1).half(), static_levels(4, SHIFT), solver
    )
    assert reached.dtype == torch.float32


def test_unknown_solver_is_refused():
    with pytest.raises(ValueError, match=r"euler, dpm2.*'heun'"):
        solve(gaussian_velocity, torch.ones(1), static_levels(4, SHIFT), "heun")


def test_a_draw_from_the_posterior_keeps_the_marginals_and_ends_at_the_clean_latent():
    random = torch.Generator().manual_seed(0)
    clean = torch.randn(200_000, generator=random, dtype=torch.float64)
    first, second, third = (torch.randn(clean.shape, generator=random, dtype=torch.float64) for _ in range(3))
    noisy = 0.2 * clean + 0.8 * first
    for stochasticity, kept in ((0.0, 0.3), (1.0, 0.3 * (0.3 * 0.2 / (0.8 * 0.7))), (2.0, 0.3 * (0.06 / 0.56) ** 2)):
        stepped = sde_step(noisy, clean, second, 0.8, 0.3, stochasticity=stochasticity)
        left = stepped - 0.7 * clean  # what is not the clean latent must be noise of level .3, and independent of it
        assert float(left.std()) == pytest.approx(0.3, rel=0.01) and abs(float((left * clean).mean())) < 0.003
        assert float((left * first).mean()) == pytest.approx(kept, abs=0.003)  # so much of the noise is the old one
        torch.testing.assert_close(sde_step(stepped, clean, third, 0.3, 0.0, stochasticity=stochasticity), clean)
        assert sde_step(first, clean, second, 1.0, 0.9, stochasticity=stochasticity).isfinite().all()


def test_a_step_of_no_stochasticity_is_eulers():
    latents, velocity, noise = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).unbind()
    for sigma, following in ((1.0, 0.7), (0.6, 0.2), (0.3, 0.0)):
        stepped = sde_step(latents, latents - sigma * velocity, noise, sigma, following, stochasticity=0.0)
        torch.testing.assert_close(stepped, euler_step(latents, velocity, sigma, following), atol=1e-5, rtol=1e-5)


def test_one_stochastic_step_is_the_posterior_of_the_path():
    clean, latents = torch.tensor(0.7), torch.tensor(-0.4)
    t, s = 0.8, 0.3
    abar = (1 - t) / (1 - s)
    variance = t**2 - (abar * s) ** 2
    mean = ((1 - s) * variance * clean + abar * s**2 * latents) / t**2
    torch.testing.assert_close(sde_step(latents, clean, torch.tensor(0.0), t, s), mean)
    spread = sde_step(latents, clean, torch.tensor(1.0), t, s) - mean
    assert float(spread) == pytest.approx(s * variance**0.5 / t, rel=1e-5)


@pytest.mark.parametrize(
    ("std", "stochasticity", "steps", "first", "second"),
    [
        (0.5, 0, 8, 0.646, 0.818),
        (0.5, 1, 8, 0.583, 0.814),
        (0.5, 2, 8, 0.554, 0.799),
        (0.5, 0, 12, 0.766, 0.933),
        (0.5, 1, 12, 0.677, 0.917),
        (0.5, 2, 12, 0.628, 0.894),
        (0.5, 0, 40, 0.929, 1.004),
        (0.5, 1, 40, 0.860, 1.014),
        (0.5, 2, 40, 0.806, 1.019),
        (0.5, 0, 100, 0.971, 1.002),
        (0.5, 1, 100, 0.934, 1.006),
        (0.5, 2, 100, 0.898, 1.011),
        (0.2, 0, 8, 0.395, 0.496),
        (0.2, 1, 8, 0.351, 0.495),
        (0.2, 2, 8, 0.346, 0.505),
        (0.2, 1, 40, 0.760, 0.968),
    ],
)
def test_the_spread_of_the_stochastic_chain_on_gaussian_data_is_as_known(std, stochasticity, steps, first, second):
    assert shares(steps, std, stochasticity)[:2] == pytest.approx([first, second], abs=0.005)


@pytest.mark.parametrize(("steps", "expected"), [(8, 1.63), (40, 1.24)])
def test_without_its_bound_the_second_order_gains_spread(steps, expected):
    assert shares(steps, 0.5, 1)[2] == pytest.approx(expected, abs=0.005)


def test_the_propagated_moments_are_those_of_samples():
    random, sigmas, std = torch.Generator().manual_seed(0), static_levels(12, SHIFT), 0.5
    latents, previous, before = torch.randn(200_000, generator=random, dtype=torch.float64), None, None
    for sigma, following in zip(sigmas, sigmas[1:]):
        share = (1 - sigma) * std**2 / ((1 - sigma) ** 2 * std**2 + sigma**2)
        clean = 0.7 + share * (latents - (1 - sigma) * 0.7)
        noise = torch.randn(latents.shape, generator=random, dtype=torch.float64)
        latents = sde2_step(latents, clean, previous, noise, (before, sigma, following))
        previous, before = clean, sigma
    mean, spread = moments(sigmas, 0.7, std, order=2)
    assert mean == pytest.approx(0.7) and float(latents.mean()) == pytest.approx(mean, abs=0.004)
    assert float(latents.std()) == pytest.approx(spread, rel=0.006)


def test_a_second_order_step_without_extrapolation_is_the_first_order_one_bit_for_bit():
    latents, clean, previous, noise = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    cases = [
        (None, (None, 0.9, 0.8)),
        (None, (0.9, 0.6, 0.3)),
        (previous, (1.0, 0.9, 0.8)),
        (previous, (0.5, 0.3, 0.0)),
    ]
    for stochasticity in (0.0, 1.0, 2.0):
        for before, sigmas in cases:
            first = sde_step(latents, clean, noise, *sigmas[1:], stochasticity=stochasticity)
            assert torch.equal(sde2_step(latents, clean, before, noise, sigmas, stochasticity=stochasticity), first)
        second = sde2_step(latents, clean, previous, noise, (0.9, 0.6, 0.3), stochasticity=stochasticity)
        assert not torch.allclose(second, first, atol=0.01)


def test_the_extrapolation_is_that_of_log_ratios_and_bounded():
    clean, previous = torch.tensor([3.0]), torch.tensor([1.0])
    # lambda is -2, -1 and -0.5: half of half the last change.
    levels = tuple(1 / (1 + math.exp(value)) for value in (-2.0, -1.0, -0.5))
    assert extrapolated(clean, previous, levels).item() == pytest.approx(3 + 0.25 * 2)
    assert extrapolated(clean, previous, levels, 0.1).item() == pytest.approx(3 + 0.1 * 2)


def test_an_unbounded_step_without_noise_is_dpm2():
    latents, clean, previous, noise = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    for sigmas in ((0.9, 0.8, 0.3), (0.6, 0.5, 0.4)):
        stepped = sde2_step(latents, clean, previous, noise, sigmas, stochasticity=0.0, most=math.inf)
        torch.testing.assert_close(stepped, dpm2_step(latents, clean, previous, sigmas), atol=1e-5, rtol=1e-5)
