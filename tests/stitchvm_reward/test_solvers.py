"""Noise levels and solvers against known numbers, diffusers, and an exactly solvable case."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stitchvm_reward.diffusion.solvers import dpm2_step, euler_step, sde_step, solve
from stitchvm_reward.families.sd3 import static_levels

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
