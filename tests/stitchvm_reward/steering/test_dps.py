"""Guidance by the gradient of a value."""

import pytest
import torch

from stitchvm_reward.errors import InputError
from stitchvm_reward.steering.best_of_n import best_of_n
from stitchvm_reward.steering.dps import dps, strength_at
from stitchvm_reward.steering.settings import BestOfN, Guidance
from tests.stitchvm_reward.steering.gaussian import MEAN, SPREAD, Parabola, Slope, chain_moments, gaussian_denoiser


@pytest.mark.parametrize("changes", [{"strength": 0.0}, {"strength": 3.0, "window": [9, 9]}])
def test_no_strength_is_plain_sampling_bit_for_bit(changes):
    denoiser = gaussian_denoiser(20, 8)
    plain = best_of_n(denoiser, Parabola(), BestOfN(particles=1))
    assert torch.equal(dps(denoiser, Parabola(), Guidance(**changes)).latents, plain.latents)


@pytest.mark.slow
def test_the_exact_value_under_the_tilt_schedule_samples_the_tilted_density():
    denoiser, rise = gaussian_denoiser(4000, 12), 0.8
    latents = dps(denoiser, Slope(rise), Guidance(strength=1.0, schedule="tilt")).latents.flatten()
    error = float(latents.std()) / len(latents) ** 0.5
    shifted = MEAN + rise * SPREAD**2
    assert abs(float(latents.mean()) - shifted) < 3 * error
    assert float(latents.var()) == pytest.approx(chain_moments(denoiser)[1], rel=0.06)  # a slope leaves it alone
    less = dps(denoiser, Slope(rise), Guidance(strength=0.5, schedule="tilt")).latents
    assert float(less.mean()) == pytest.approx(MEAN + rise * SPREAD**2 / 2, abs=0.04)


def test_strength_over_the_levels():
    sigmas = [1.0, 0.9, 0.6, 0.2, 0.0]
    given = {
        "constant": [2.0, 2.0, 2.0, 2.0],
        "sigma": [2.0, 1.8, 1.2, 0.4],
        "tilt": [20.0, 18.0, 3.0, 0.5],  # at t = 1 with the second level's denominator: finite
    }
    for schedule, wanted in given.items():
        settings = Guidance(strength=2.0, schedule=schedule)
        assert [strength_at(settings, step, sigmas) for step in range(4)] == pytest.approx(wanted)
    windowed = Guidance(strength=2.0, schedule="constant", window=[1, 2])
    assert [strength_at(windowed, step, sigmas) for step in range(4)] == [0.0, 2.0, 2.0, 0.0]


def test_a_strength_that_breaks_the_latents_is_told_with_the_step():
    with pytest.raises(InputError, match=r"not finite after step [0-9]+ of 8: lower dps.strength, which is 1e\+30"):
        dps(gaussian_denoiser(2, 8), Parabola(), Guidance(strength=1e30))


def test_at_second_order_the_predictions_that_are_extrapolated_have_the_guidance():
    # With the exact value, 8 steps reach the tilted mean. Without the term in the predictions they pass it by 0.1.
    denoiser, rise = gaussian_denoiser(4000, 8, order=2), 0.8
    latents = dps(denoiser, Slope(rise), Guidance(strength=1.0, schedule="tilt")).latents.flatten()
    error = float(latents.std()) / len(latents) ** 0.5
    assert abs(float(latents.mean()) - (MEAN + rise * SPREAD**2)) < 4 * error < 0.05
    assert float(latents.var()) == pytest.approx(chain_moments(denoiser)[1], rel=0.06)
