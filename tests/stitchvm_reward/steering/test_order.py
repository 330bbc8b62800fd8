"""Steps of second order: the previous prediction stays with its particle."""

import pytest

from stitchvm_reward.steering.best_of_n import best_of_n
from stitchvm_reward.steering.denoiser import Denoiser
from stitchvm_reward.steering.dps import dps
from stitchvm_reward.steering.fk import fk
from stitchvm_reward.steering.settings import BestOfN, FeynmanKac, Guidance
from stitchvm_reward.steering.values import MonteCarloValue
from tests.stitchvm_reward.steering.gaussian import Parabola, chain_moments, gaussian_denoiser

STEPS = 8


def kept_pairs(latents, previous):
    """The particles as pairs of their latent and their previous prediction."""
    return set(zip(latents.flatten().tolist(), previous.flatten().tolist()))


@pytest.mark.parametrize(
    "steer",
    [
        lambda denoiser: fk(denoiser, Parabola(), FeynmanKac(particles=8, window=[1, 7], every=1)),
        lambda denoiser: fk(denoiser, Parabola(), FeynmanKac(particles=8, proposals=3, window=[2, 6], every=2)),
        lambda denoiser: best_of_n(denoiser, Parabola(), BestOfN(particles=8, prune_at=4)),
        lambda denoiser: dps(denoiser, Parabola(), Guidance(strength=0.5, window=[2, 5])),
    ],
    ids=["fk", "fk with proposals", "best of n, pruned", "dps"],
)
def test_a_previous_prediction_follows_its_particle(monkeypatch, steer):
    moves, move = [], Denoiser.move

    def watched(self, particles, velocity, noise, step):
        moved = move(self, particles, velocity, noise, step)
        predicted = particles.latents - self.sigmas[step] * velocity
        moves.append((particles, kept_pairs(moved.latents, predicted)))
        return moved

    monkeypatch.setattr(Denoiser, "move", watched)
    steer(gaussian_denoiser(5, STEPS, order=2))
    assert len(moves) == STEPS and moves[0][0].previous is None
    for (_, made), (particles, _) in zip(moves, moves[1:]):
        assert kept_pairs(particles.latents, particles.previous) <= made


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_plain_sampling_has_the_spread_of_its_order(stochasticity):
    for order in (1, 2):
        denoiser = gaussian_denoiser(4000, STEPS, stochasticity=stochasticity, order=order)
        latents = best_of_n(denoiser, Parabola(), BestOfN(particles=1)).latents.double()
        mean, variance = chain_moments(denoiser)
        assert float(latents.mean()) == pytest.approx(mean, abs=0.04)
        assert float(latents.var()) == pytest.approx(variance, rel=0.08)
    first, second = (chain_moments(gaussian_denoiser(1, STEPS, order=order))[1] for order in (1, 2))
    assert second > 1.3 * first


def test_rollouts_of_a_monte_carlo_value_have_the_order_of_the_chain():
    class Square:
        def score(self, images, prompts):
            return images.flatten().square()

    value = MonteCarloValue({"square": Square()}, {"square": 1.0}, 1)
    squares = {}
    for order in (1, 2):
        denoiser = gaussian_denoiser(4000, STEPS, order=order)
        denoiser.generator.decode = lambda latents: latents
        squares[order] = float(value.measure(denoiser, denoiser.start(1).latents, 0)[0].mean())
        mean, variance = chain_moments(denoiser)
        assert squares[order] == pytest.approx(mean**2 + variance, rel=0.08)
    assert squares[2] > 1.2 * squares[1]
