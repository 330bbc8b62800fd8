"""Feynman-Kac steering: what it samples, against closed forms, and how it resamples."""

import math

import pytest
import torch

from stitchvm_reward.errors import InputError
from stitchvm_reward.steering.best_of_n import best_of_n
from stitchvm_reward.steering.denoiser import Known
from stitchvm_reward.steering.fk import effective_size, fk, normalised, resample, tempered_share
from stitchvm_reward.steering.settings import BestOfN, FeynmanKac
from stitchvm_reward.steering.trace import Event, Steered
from stitchvm_reward.steering.values import Value
from tests.stitchvm_reward.steering.gaussian import Parabola, chain_moments, gaussian_denoiser

STEPS, PROMPTS, PARTICLES = 8, 16, 512


def settings(**changes) -> FeynmanKac:
    return FeynmanKac(**({"particles": PARTICLES, "temperature": 1.0, "every": 2, "window": [1, 7]} | changes))


def moments(steered):
    """Means over the prompts of the weighted mean and variance, and the standard errors of both."""
    latents, weights = steered.latents.flatten(1).double(), steered.weights
    means = (weights * latents).sum(1)
    variances = (weights * (latents - means[:, None]).square()).sum(1)
    return [(float(x.mean()), float(x.std()) / len(x) ** 0.5) for x in (means, variances)]


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ({"temperature": 0.0}, 1),
        ({"temperature": 1.0}, 1),
        ({"temperature": 1.0, "resampling": "multinomial"}, 2),
        ({"temperature": 3.0, "resampling": "multinomial"}, 1),
        ({"temperature": 3.0}, 2),
        ({"temperature": 3.0, "least_ess": 0.9}, 2),
    ],
)
def test_the_weighted_particles_are_samples_of_the_tilted_chain(changes, order):
    denoiser, value = gaussian_denoiser(PROMPTS, STEPS, order=order), Parabola()
    mean, variance = chain_moments(denoiser)
    temperature = changes["temperature"]
    precision = 1 / variance + temperature
    expected = (mean / variance + temperature * value.centre) / precision, 1 / precision
    steered = fk(denoiser, value, settings(**changes))
    for (found, error), wanted in zip(moments(steered), expected):
        assert abs(found - wanted) < 3 * error, (found, wanted, error)
        assert error < 0.05 * variance**0.5


def test_that_comparison_finds_weights_that_forget_what_was_weighed_before():
    denoiser, value = gaussian_denoiser(PROMPTS, STEPS), Parabola()
    mean, variance = chain_moments(denoiser)
    expected = (mean / variance + value.centre) / (1 / variance + 1)

    class Forgetful(Parabola):
        """Counts what the first resampling weighed once more."""

        def one(self, denoiser, latents, rows, count, step):
            values, known = super().one(denoiser, latents, rows, count, step)
            return values * (2 if step == denoiser.steps else 1), known

    found, error = moments(fk(denoiser, Forgetful(), settings()))[0]
    assert abs(found - expected) > 10 * error


@pytest.mark.parametrize("stochasticity", [1.0, 2.0])
def test_no_temperature_is_plain_sampling(stochasticity):
    denoiser = gaussian_denoiser(4, STEPS, stochasticity=stochasticity)
    plain = best_of_n(denoiser, Parabola(), BestOfN(particles=PARTICLES))
    steered = fk(denoiser, Parabola(), settings(temperature=0.0))
    assert torch.equal(steered.latents, plain.latents)
    assert all(torch.equal(event.effective, torch.full((4,), PARTICLES).double()) for event in steered.trace)
    # Multinomial resampling draws doubles even then: equal in distribution.
    latents = fk(denoiser, Parabola(), settings(temperature=0.0, resampling="multinomial")).latents.flatten().double()
    mean, variance = chain_moments(denoiser)
    assert float(latents.mean()) == pytest.approx(mean, abs=0.06)
    assert float(latents.var()) == pytest.approx(variance, rel=0.15)


def test_the_shares_of_the_temperature_keep_the_effective_size():
    log_weights = torch.tensor([[0.0, 2.0], [0.0, 0.1], [1.0, 1.0], [0.0, 1e6]], dtype=torch.float64)
    share = tempered_share(log_weights, 1.6)
    # Two weights in the ratio 3 : 1 have the effective size 1.6.
    assert share.flatten().tolist() == pytest.approx([math.log(3) / 2, 1, 1, math.log(3) / 1e6], rel=1e-6)
    assert (effective_size(normalised(share * log_weights)) >= 1.6).all()
    assert torch.equal(tempered_share(log_weights, 0.0), torch.ones(4, 1).double())


def test_a_least_effective_size_is_kept_and_leaves_more_founders_at_a_lower_value():
    denoiser, value = gaussian_denoiser(64, STEPS), Parabola()
    free, kept = (fk(denoiser, value, settings(particles=8, temperature=10.0, least_ess=least)) for least in (0, 0.75))
    assert min(float(event.effective.min()) for event in free.trace) < 6
    assert min(float(event.effective.min()) for event in kept.trace) >= 6
    assert float(kept.founders.double().mean()) > float(free.founders.double().mean()) + 1
    assert float(kept.values.mean()) < float(free.values.mean())


def test_founders_are_the_first_particles_with_descendants_at_the_end():
    def event(*ancestors):
        return Event(1, 0.5, torch.zeros(2, 4), torch.ones(2), torch.tensor(ancestors))

    first, second = event([0, 1, 1, 3], [0, 1, 2, 3]), event([1, 2, 2, 2], [0, 0, 3, 3])
    nothing = torch.zeros(2, 4)
    steered = Steered(nothing, nothing, nothing, [first, Event(2, 0.4, nothing), second])
    assert steered.founders.tolist() == [1, 2]
    assert Steered(nothing, nothing, nothing).founders.tolist() == [4, 4]


@pytest.mark.parametrize("each", [1, 5])
def test_a_particle_has_as_many_children_as_its_weight_says_on_average(each):
    weights = torch.tensor([[0.02, 0.4, 0.28, 0.0, 0.3]], dtype=torch.float64)
    uniforms = torch.rand(20_000, each, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ancestors = resample(weights.expand(20_000, 5), uniforms)
    counts = torch.nn.functional.one_hot(ancestors, 5).sum(1).double()
    assert torch.allclose(counts.mean(0), 5 * weights[0], atol=0.03)
    assert (ancestors.diff(dim=1) >= 0).all()
    if each == 1:  # systematic: rounded down or up, never further off
        assert ((counts - 5 * weights).abs() < 1).all()


def test_equal_weights_change_nothing_in_systematic_resampling():
    for count in (2, 3, 7, 14, 100):
        weights = normalised(torch.full((50, count), -3.0))
        uniforms = torch.rand(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
        assert torch.equal(resample(weights, uniforms), torch.arange(count).expand(50, count))


def test_weights_of_any_size_stay_numbers():
    weights = normalised(torch.tensor([[1e6, 1e6 - 1, -1e6], [-1e8, -1e8, -1e8]]))
    assert torch.allclose(weights.sum(1), torch.ones(2, dtype=torch.float64)) and weights.isfinite().all()
    assert weights[0, 0] / weights[0, 1] == pytest.approx(2.71828, rel=1e-4)
    assert effective_size(weights).tolist() == pytest.approx([1 / (0.731059**2 + 0.268941**2), 3.0], rel=1e-4)


def test_proposals_raise_the_value_and_the_first_is_the_plain_one():
    denoiser, value = gaussian_denoiser(8, STEPS), Parabola(centre=2.0)
    reached = [
        float(fk(denoiser, value, settings(particles=16, proposals=count, window=[7, 7])).values.mean())
        for count in (1, 2, 6)
    ]
    assert reached[0] < reached[1] < reached[2]
    particles = denoiser.start(2)
    one = denoiser.advance(particles, particles.latents, 1).latents
    three = denoiser.advance(particles, particles.latents, 1, proposals=3).latents
    assert torch.equal(one, three[::3]) and len(three) == 48


def test_proposals_are_drawn_in_their_window_and_else_in_the_first_two_fifths():
    assert list(FeynmanKac(proposals=2).proposing(40)) == list(range(1, 17))
    assert list(FeynmanKac(proposals=2).proposing(8)) == [1, 2, 3, 4]
    assert list(FeynmanKac(proposals=1, proposal_window=[2, 5]).proposing(8)) == []
    seen = []

    class Watched(Parabola):
        def one(self, denoiser, latents, rows, count, step):
            seen.append((step, count))
            return super().one(denoiser, latents, rows, count, step)

    own = settings(particles=4, proposals=3, proposal_window=[3, 4], window=[2, 4], every=2)
    fk(gaussian_denoiser(1, STEPS), Watched(), own)
    assert seen == [(2, 4), (3, 12), (4, 12), (STEPS, 4)]


def test_a_value_that_is_not_finite_is_told():
    class Broken(Value):
        def one(self, denoiser, latents, rows, count, step):
            return torch.full((len(latents),), float("nan") if step == 5 else 1.0), Known()

    with pytest.raises(InputError, match="32 of 32 values after 5 steps are not finite"):
        fk(gaussian_denoiser(2, STEPS), Broken(), settings(particles=16))


def test_the_noise_of_a_particle_depends_on_its_prompts_number_alone():
    whole, value = gaussian_denoiser(5, STEPS), Parabola()
    part = whole.part(range(2, 4))
    for steer in (
        lambda denoiser: fk(denoiser, value, settings(particles=8)),
        lambda denoiser: best_of_n(denoiser, value, BestOfN(particles=8, prune_at=3)),
    ):
        assert torch.equal(steer(whole).latents[2:4], steer(part).latents)


def test_pruning_takes_the_best_so_far_to_the_end():
    denoiser, value = gaussian_denoiser(6, STEPS), Parabola(centre=2.0)
    whole = best_of_n(denoiser, value, BestOfN(particles=16))
    pruned = best_of_n(denoiser, value, BestOfN(particles=16, prune_at=5))
    plain = best_of_n(denoiser, value, BestOfN(particles=1))
    assert pruned.latents.shape[1] == 1 and [event.step for event in pruned.trace] == [5]
    means = [float(steered.values.amax(1).mean()) for steered in (plain, pruned, whole)]
    assert means[0] < means[1] < means[2]
