"""The loss against the numbers and formulas of its papers, computed here independently."""

import pytest
import torch

from nft.objectives.matching import Batch
from nft.objectives.nft import nft_loss
from stitchvm_reward.diffusion.path import anchor_coefficients, bridge, bridge_velocity

CLEAN, NOISE = torch.tensor([[1.0, -1.0, 0.5, 0.0]]), torch.tensor([[0.0, 1.0, -1.0, 2.0]])
VELOCITY, OLD = torch.tensor([[-0.8, 1.8, -1.2, 1.6]]), torch.tensor([[-1.2, 1.5, -1.0, 2.2]])
REFERENCE = torch.tensor([[-1.0, 1.4, -0.9, 2.1]])
HALF, ZERO = torch.tensor([0.5]), torch.tensor([0.0])


def example(velocity, advantage, beta, reference=None):
    r = torch.tensor([0.5 + advantage / 10])
    noisy = 0.5 * CLEAN + 0.5 * NOISE
    return nft_loss(Batch(velocity, OLD, reference, CLEAN, NOISE, noisy, HALF, ZERO, r), beta)


def random_case(batch=6, tau=None, seed=0):
    """Random tensors and levels t > tau, in the order of Batch's fields."""
    generator = torch.Generator().manual_seed(seed)
    velocity, old, reference, anchor, noise = (torch.randn(batch, 3, 4, 4, generator=generator) for _ in range(5))
    tau = torch.rand(batch, generator=generator) * 0.7 if tau is None else torch.full((batch,), tau)
    t = tau + 0.05 + (0.95 - tau) * torch.rand(batch, generator=generator)
    kept, added = bridge(column(t), column(tau))
    r = torch.rand(batch, generator=generator)
    return velocity, old, reference, anchor, noise, kept * anchor + added * noise, t, tau, r


def column(levels):
    return levels.view(-1, 1, 1, 1)


def mean(values):
    return values.flatten(1).mean(1)


@pytest.mark.parametrize(
    "tau, t, abar, sbar, a, b",
    [
        (0.6, 0.8, 0.5, 0.7416198487, 0.625, 0.275),
        (0.6, 1.0, 0.0, 1.0, 0.4, 0.4),
        (0.751121, 0.780947, None, None, 0.8847356, 0.0550750),
        (0.0, 0.3, 0.7, 0.3, 1.0, 0.3),
    ],
)
def test_bridge_and_anchor_coefficients_have_the_known_values(tau, t, abar, sbar, a, b):
    levels = torch.tensor(t, dtype=torch.float64), torch.tensor(tau, dtype=torch.float64)
    if abar is not None:
        assert bridge(*levels) == (pytest.approx(abar, abs=1e-9), pytest.approx(sbar, abs=1e-9))
    assert anchor_coefficients(*levels) == (pytest.approx(a, abs=1e-7), pytest.approx(b, abs=1e-7))


def test_anchor_coefficients_stay_finite_at_the_anchors_own_level():
    tau = torch.tensor(0.6, dtype=torch.float64)
    a, b = anchor_coefficients(tau, tau)
    assert a == pytest.approx(1) and b == 0


def test_anchor_is_recovered_from_bridge_and_its_velocity():
    generator = torch.Generator().manual_seed(1)
    tau = torch.rand(500, generator=generator, dtype=torch.float64) * 0.95
    t = tau + (1 - tau) * torch.rand(500, generator=generator, dtype=torch.float64).clamp_min(1e-3)
    anchor, noise = torch.randn(2, 500, generator=generator, dtype=torch.float64)
    kept, added = bridge(t, tau)
    a, b = anchor_coefficients(t, tau)
    recovered = a * (kept * anchor + added * noise) - b * bridge_velocity(anchor, noise, t, tau)
    torch.testing.assert_close(recovered, anchor, rtol=0, atol=1e-10)


def test_bridge_velocity_is_the_time_derivative_of_the_bridge():
    t, tau = torch.tensor([0.65, 0.8, 0.97], dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    anchor, noise, step = torch.tensor(0.7), torch.tensor(-1.3), 1e-6
    latents = [kept * anchor + added * noise for kept, added in (bridge(t - step, tau), bridge(t + step, tau))]
    slope = (latents[1] - latents[0]) / (2 * step)
    torch.testing.assert_close(bridge_velocity(anchor, noise, t, tau), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta, advantage, expected", [(1.0, 1.0, 1.18448276), (0.1, -2.0, 10.61690323)])
def test_policy_loss_has_the_known_value(beta, advantage, expected):
    policy, _, _ = example(VELOCITY, advantage, beta)
    assert policy.item() == pytest.approx(expected, abs=2e-6)


def test_total_loss_has_the_known_value():
    policy, kl, _ = example(VELOCITY, 1.0, 1.0, REFERENCE)
    assert (policy + 1e-4 * kl).item() == pytest.approx(1.18449626, abs=1e-6)


@pytest.mark.parametrize("advantage", [-5.0, -1.0, 0.0, 2.5, 5.0])
def test_loss_at_the_old_velocity_does_not_depend_on_the_advantage(advantage):
    policy, _, _ = example(OLD.clone(), advantage, 1.0)
    assert policy.item() == pytest.approx(1.0357142857, abs=1e-6)


def test_kl_and_deviation_are_mean_squared_distances():
    _, kl, deviation = example(VELOCITY, 1.0, 1.0, REFERENCE)
    assert kl.item() == pytest.approx((VELOCITY - REFERENCE).square().mean().item())
    assert deviation.item() == pytest.approx((VELOCITY - OLD).square().mean().item())
    _, without, _ = example(VELOCITY, 1.0, 1.0)
    assert without.item() == 0


@pytest.mark.parametrize("space", ["anchor", "velocity"])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_gradient_at_the_old_velocity_is_2r_minus_1_times_the_flow_matching_one(space, beta):
    _, old, _, anchor, noise, noisy, t, tau, r = random_case()
    velocity = old.clone().requires_grad_()

    def gradient(r):
        policy, _, _ = nft_loss(Batch(velocity, old, None, anchor, noise, noisy, t, tau, r), beta, space)
        return torch.autograd.grad(policy.sum(), velocity)[0]

    certain = gradient(torch.ones_like(r))
    torch.testing.assert_close(gradient(r), column(2 * r - 1) * certain, rtol=1e-4, atol=1e-6)

    residual = velocity - bridge_velocity(anchor, noise, column(t), column(tau))
    matching = torch.autograd.grad(mean(residual.square()).sum(), velocity)[0]
    scale = 5.0
    if space == "anchor":
        b = column(anchor_coefficients(t, tau)[1])
        scale = 5 * b.square() / column(mean((b * residual).abs())).detach()
    torch.testing.assert_close(certain, scale * matching, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_anchor_loss_at_tau_0_is_the_published_one(beta):
    velocity, old, reference, clean, noise, noisy, t, tau, r = random_case(tau=0.0)

    def branch(prediction):
        difference = noisy - column(t) * prediction - clean
        weight = difference.abs().mean(dim=(1, 2, 3)).clip(min=1e-5)
        return (difference**2 / column(weight)).mean(dim=(1, 2, 3))

    positive = branch(beta * velocity + (1 - beta) * old)
    negative = branch((1 + beta) * old - beta * velocity)
    expected = (r * positive / beta + (1 - r) * negative / beta) * 5
    policy, kl, _ = nft_loss(Batch(velocity, old, reference, clean, noise, noisy, t, tau, r), beta)
    torch.testing.assert_close(policy, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl, ((velocity - reference) ** 2).mean(dim=(1, 2, 3)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_velocity_loss_is_the_printed_one(beta):
    velocity, old, _, anchor, noise, noisy, t, tau, r = random_case(seed=2)
    level, stopped = column(t).double().requires_grad_(), column(tau).double()
    sbar = (level**2 - ((1 - level) / (1 - stopped) * stopped) ** 2).sqrt()
    (slope,) = torch.autograd.grad(sbar.sum(), level)
    target = (-anchor / (1 - stopped) + slope * noise).float()
    positive = mean((beta * velocity + (1 - beta) * old - target).square())
    negative = mean(((1 + beta) * old - beta * velocity - target).square())
    expected = 5 * (r * positive + (1 - r) * negative) / beta
    policy, _, _ = nft_loss(Batch(velocity, old, None, anchor, noise, noisy, t, tau, r), beta, "velocity")
    torch.testing.assert_close(policy, expected, rtol=1e-5, atol=1e-5)


def test_perfect_prediction_gives_zero_loss_and_finite_gradient():
    velocity = (NOISE - CLEAN).clone().requires_grad_()
    noisy = 0.5 * CLEAN + 0.5 * NOISE
    batch = Batch(velocity, NOISE - CLEAN, None, CLEAN, NOISE, noisy, HALF, ZERO, torch.tensor([1.0]))
    policy, _, _ = nft_loss(batch, 1.0)
    policy.sum().backward()
    assert policy.item() == 0 and velocity.grad.isfinite().all()


def test_gradient_flows_to_the_current_velocity_alone():
    case = [tensor.clone().requires_grad_() for tensor in random_case()[:3]]
    policy, kl, _ = nft_loss(Batch(*case, *random_case()[3:]), beta=1.0)
    (policy + kl).sum().backward()
    assert case[0].grad is not None and case[1].grad is None and case[2].grad is None


def test_half_precision_velocities_give_float32_losses_that_do_not_underflow():
    velocity = torch.full((1, 4), 1e-4, dtype=torch.float16, requires_grad=True)
    zeros = torch.zeros(1, 4)
    policy, kl, deviation = nft_loss(Batch(velocity, zeros, zeros.half(), zeros, zeros, zeros, HALF, ZERO, HALF), 1.0)
    assert policy.dtype == kl.dtype == deviation.dtype == torch.float32
    assert kl.item() == pytest.approx(1e-8, rel=1e-2)


def test_gradients_of_a_full_size_epoch_are_too_small_for_float16():
    """Which is why model.dtype=float16 is refused for training."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(4, 16, 64, 64, generator=generator) for _ in range(4)]
    t, tau, r = torch.full((4,), 0.5), torch.zeros(4), torch.tensor([0.0, 0.4, 0.6, 1.0])

    def lost(dtype: torch.dtype) -> float:
        velocity = (draw[0] + 0.1 * draw[3]).to(dtype).requires_grad_()
        policy, *_ = nft_loss(Batch(velocity, draw[0], None, draw[1], draw[2], draw[1] + draw[2], t, tau, r), 1.0)
        (policy.sum() / (48 * 24 * 9)).backward()  # the share of one level of one of 48 x 24 samples
        return float((velocity.grad == 0).float().mean())

    assert lost(torch.bfloat16) < 0.001
    assert lost(torch.float16) > 0.28


def test_unknown_space_is_refused():
    with pytest.raises(ValueError, match=r"anchor, velocity.*'pixel'"):
        nft_loss(Batch(*random_case()), beta=1.0, space="pixel")
