"""Advantage-weighted matching against numbers of the official code and against gradients that are written out here."""

import pytest
import torch

from nft.advantage import CLIP
from nft.config import load_recipe
from nft.cost.plan import recipe_geometry, work, work_lines
from nft.cost.shapes import costs
from nft.objectives.awm import AWM as Objective
from nft.objectives.awm import awm_loss, matching_loss
from nft.objectives.matching import Batch
from stitchvm_reward.diffusion.path import anchor_coefficients, bridge, bridge_velocity
from stitchvm_reward.errors import InputError
from tests.tiny import AWM, STOPPED

CLEAN = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.3, 0.2, -0.7, 0.9]])
NOISE = torch.tensor([[0.0, 1.0, -1.0, 2.0], [-0.4, 0.8, 1.1, -0.2]])
VELOCITY = torch.tensor([[-0.8, 1.8, -1.2, 1.6], [-0.5, 0.5, 1.5, -1.0]])
OLD = torch.tensor([[-1.2, 1.5, -1.0, 2.2], [-0.9, 0.7, 1.6, -0.9]])
REFERENCE = torch.tensor([[-1.0, 1.4, -0.9, 2.1], [-0.6, 0.4, 1.7, -1.2]])
LEVELS, ADVANTAGES = torch.tensor([0.5, 0.8]), torch.tensor([1.0, -2.0])
# What compute_log_prob_awm of scxue/advantage_weighted_matching (commit be51372, weighting "ghuber" with this power)
# and the policy loss of its training script give for these tensors, in float64: policy term, gradient of the velocity.
OFFICIAL = {
    0.25: (
        [-0.23523983314849886, 0.38068682895473355],
        [
            [0.0764082744717598, -0.07640830427408218, 0.1146124079823494, -0.1528165489435196],
            [-0.3573834300041199, 0.17869171500205994, 0.5360751152038574, -0.17869165539741516],
        ],
    ),
    0.5: (
        [-0.21961542124562514, 0.3915330601284749],
        [
            [0.038230136036872864, -0.03823014721274376, 0.057345200330019, -0.07646027207374573],
            [-0.1617494523525238, 0.0808747261762619, 0.2426241636276245, -0.08087470382452011],
        ],
    ),
    1.0: (
        [-0.20634868641955648, 0.3984031987534251],
        [
            [0.010317433625459671, -0.010317436419427395, 0.015476148575544357, -0.020634867250919342],
            [-0.031872257590293884, 0.015936128795146942, 0.047808386385440826, -0.015936125069856644],
        ],
    ),
}


def example(velocity, old=OLD, reference=None, worth=ADVANTAGES):
    t = LEVELS[:, None]
    return Batch(velocity, old, reference, CLEAN, NOISE, (1 - t) * CLEAN + t * NOISE, LEVELS, 0 * LEVELS, worth)


def stopped_case(batch=5, seed=0):
    """Random tensors and levels t > tau > 0."""
    generator = torch.Generator().manual_seed(seed)
    velocity, old, anchor, noise = (torch.randn(batch, 3, 4, 4, generator=generator) for _ in range(4))
    tau = 0.2 + 0.5 * torch.rand(batch, generator=generator)
    t = tau + 0.05 + (0.95 - tau) * torch.rand(batch, generator=generator)
    kept, added = (part.view(-1, 1, 1, 1) for part in bridge(t, tau))
    worth = torch.linspace(-5, 5, batch)
    return Batch(velocity, old, None, anchor, noise, kept * anchor + added * noise, t, tau, worth)


@pytest.mark.parametrize("power", OFFICIAL)
def test_loss_and_gradient_are_those_of_the_official_code(power):
    velocity = VELOCITY.clone().requires_grad_()
    policy, *_ = awm_loss(example(velocity), power, clip=1.0)
    policy.sum().backward()
    expected, gradient = (torch.tensor(values) for values in OFFICIAL[power])
    torch.testing.assert_close(policy.detach(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(velocity.grad, gradient, rtol=1e-4, atol=0)


def test_kl_and_deviation_are_mean_squared_distances_with_gradient():
    velocity = VELOCITY.clone().requires_grad_()
    _, kl, deviation = awm_loss(example(velocity, reference=REFERENCE), 0.25, 1.0)
    assert kl.tolist() == pytest.approx([0.135, 0.025], rel=1e-5)  # both by the official code too
    assert deviation.tolist() == pytest.approx([0.1625, 0.055], rel=1e-5)
    (found,) = torch.autograd.grad((kl + 3 * deviation).sum(), velocity)
    torch.testing.assert_close(found, ((VELOCITY - REFERENCE) + 3 * (VELOCITY - OLD)) * 2 / 4)
    assert awm_loss(example(VELOCITY), 0.25, 1.0)[1].tolist() == [0, 0]


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_at_the_old_velocity_the_ratio_is_1_and_the_gradient_that_of_weighted_matching(power):
    case = stopped_case()
    velocity = case.old.clone().requires_grad_()
    policy, *_ = awm_loss(Batch(velocity, *list(vars(case).values())[1:]), power, 1e-5)
    torch.testing.assert_close(policy.detach(), -case.worth / CLIP, rtol=1e-5, atol=0)
    (found,) = torch.autograd.grad(policy.sum(), velocity)

    t, tau = (level.double().view(-1, 1, 1, 1) for level in (case.t, case.tau))
    target = bridge_velocity(case.anchor.double(), case.noise.double(), t, tau)
    again = case.old.double().requires_grad_()
    error = (again - target).square().mean((1, 2, 3))
    weight = anchor_coefficients(case.t.double(), case.tau.double())[1]
    (case.worth.double() / CLIP * weight * error**power / power).sum().backward()
    torch.testing.assert_close(found.double(), again.grad, rtol=1e-4, atol=1e-6)


def test_squared_error_is_that_of_the_anchor_divided_by_its_coefficient():
    """So nothing grows without bound near tau, where the velocity's target does."""
    case = stopped_case()
    a, b = (part.view(-1, 1, 1, 1) for part in anchor_coefficients(case.t, case.tau))
    error = (a * case.noisy - b * case.velocity - case.anchor).square().mean((1, 2, 3))
    torch.testing.assert_close(matching_loss(case.velocity, case, 1.0), error / b.flatten(), rtol=1e-3, atol=1e-6)


def test_a_ratio_beyond_the_clip_range_has_no_gradient_where_it_would_go_further():
    """The first sample's velocity fits better than the old one (ratio above 1), the second's worse."""
    for advantage, moves in ((1.0, [False, True]), (-1.0, [True, False])):
        velocity = VELOCITY.clone().requires_grad_()
        policy, *_ = awm_loss(example(velocity, worth=torch.full((2,), 5 * advantage)), 0.25, clip=0.01)
        policy.sum().backward()
        assert [bool(row.abs().max() > 0) for row in velocity.grad] == moves
        clipped = [-1.01, -0.99] if advantage > 0 else [1.01, 0.99]
        for value, expected, moved in zip(policy.tolist(), clipped, moves):
            assert moved or value == pytest.approx(expected)


def test_a_perfect_prediction_has_a_finite_gradient():
    velocity = (NOISE - CLEAN).clone().requires_grad_()
    policy, *_ = awm_loss(example(velocity), 0.25, 1.0)
    policy.sum().backward()
    assert velocity.grad.isfinite().all()


def test_half_precision_velocities_give_float32_losses():
    case = example(VELOCITY.half(), OLD.half(), REFERENCE.half())
    assert {term.dtype for term in awm_loss(case, 0.25, 1.0)} == {torch.float32}


@pytest.mark.parametrize("more", [(), pytest.param(STOPPED, marks=pytest.mark.slow)], ids=["full", "stopped"])
def test_steps_on_the_same_samples_make_the_better_ones_likelier(make_trainer, tmp_path, more):
    """The mean of A times the matching loss falls: good samples are fitted better than before, bad ones worse."""
    trainer = make_trainer(tmp_path / "run", *AWM, *more, "train.learning_rate=5e-4", "train.levels_per_sample=1")
    rollouts, objective = trainer.collector.collect(0), trainer.objective
    losses = [objective.learn(rollouts, 0).metrics["train/policy_loss"] for _ in range(5)]
    assert losses[0] == pytest.approx(0, abs=1e-6), "at ratio 1 the loss is the mean advantage"
    assert all(later < earlier for earlier, later in zip(losses, losses[1:])), losses


def test_the_distance_to_the_old_policy_is_part_of_the_loss(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", *AWM, "train.beta_old=3", "train.beta_kl=0")
    for index, matrix in enumerate(trainer.learner.policy.tensors("current").values()):
        matrix.data += 0.05 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(index))
    trainer.learner.policy.old_is_current = False
    rollout = trainer.collector.collect(0)[0]
    object.__setattr__(rollout, "worth", torch.ones(len(rollout.samples)))
    (compute,) = trainer.objective.losses(rollout, 0)
    loss, (policy, _, deviation) = compute()
    assert float(deviation) > 1e-3 and float(loss.detach()) == pytest.approx(float(policy + 3 * deviation), rel=1e-5)


@pytest.mark.parametrize(
    "settings, told",
    [
        (("train.matching_power=0",), r"train.matching_power must be in \(0, 1\], got 0"),
        (("train.matching_clip=0",), "train.matching_clip must be positive and finite"),
        (("train.beta_old=-1",), "train.beta_old must be at least 0"),
        (("train.old_schedule=0",), "train.beta_old must be 0 where the old policy is always the current one"),
        (("rollout.group_size=1",), "rollout.group_size must be at least 2"),
        (("train.space=velocity",), "train.space is not read where train.objective is awm: leave it at anchor"),
        (("train.beta=.5",), "train.beta is not read"),
        (("train.sde_steps=1",), "train.sde_steps is not read"),
        (("train.levels_per_sample=4",), "at most the 3 solver levels"),
        (("train.beta_kl=0.04",), "train.reference_share must be 1"),
        (
            ("train.objective=nft", "train.matching_clip=2"),
            "train.matching_clip is not read where train.objective is nft",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(overrides, tmp_path, settings, told):
    with pytest.raises(InputError, match=told) as refused:
        load_recipe("recipes/shapes/aesthetic.yaml", overrides(tmp_path, *AWM, *settings))
    assert "\n" not in str(refused.value)


def test_the_plan_counts_what_is_run():
    recipe = load_recipe("recipes/shapes/aesthetic.yaml", [*AWM, "train.old_schedule=1", "train.levels_per_sample=3"])
    found = costs(recipe)
    phases = work(recipe, recipe_geometry(recipe, 1), found)
    assert phases["train"] == pytest.approx(64 * 3 * (found.training_flops + found.forward_flops) / 1e12)
    assert Objective.cost(load_recipe("recipes/awm.yaml").train).frozen == 2
    assert "3 of 10 grid levels per sample, matching power 0.25, clip 1, beta_old 1" in "\n".join(work_lines(recipe, 1))
