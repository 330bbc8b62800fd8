"""Flow-GRPO's stochastic steps and its loss: numbers of the official code, distributions, and gradients by hand."""

import pytest
import torch
from torch.distributions import Normal

from nft.config import load_recipe
from nft.cost.memory import memory
from nft.cost.plan import recipe_geometry, work, work_lines
from nft.cost.shapes import costs
from nft.objectives.compared import clipped_surrogate
from nft.objectives.flow_grpo import Step, kl_term, log_probability, sde_scale, step_mean, window_starts
from nft.rollout import recut, rollout_stops, sample
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs import randomness
from tests.tiny import FLOW_GRPO, STOPPED

# Levels of ten steps with shift 3, of which the first and the fourth step are taken.
LEVELS = [1.0, 0.960129321, 0.913348973, 0.857692301, 0.790368259]
LATENTS = torch.tensor([[0.5, -1.0, 0.25, 1.5], [0.1, 0.2, -0.3, 0.4]])
VELOCITY = torch.tensor([[1.0, -0.5, 0.75, -1.25], [-0.6, 0.9, 0.3, -0.2]])
REFERENCE = torch.tensor([[0.9, -0.4, 0.8, -1.0], [-0.5, 0.7, 0.1, -0.3]])
END = torch.tensor([[0.2, -0.6, 0.1, 1.7], [0.0, 0.1, -0.5, 0.6]])
ADVANTAGES = torch.tensor([2.0, -1.5])
# What sde_step_with_logprob of yifan123/flow_grpo (commit ac4c86e, noise_level 0.7) gives for these tensors, and the
# losses of its training script with the log-probabilities of REFERENCE as the old ones.
MEAN = torch.tensor(
    [
        [0.3376293480396271, -0.7350647449493408, 0.15884700417518616, 1.1823383569717407],
        [0.13870041072368622, 0.10138211399316788, -0.2903735935688019, 0.3704010844230652],
    ]
)
SCALES = [3.505671262741089, 1.7185002565383911]
LOG_PROBS = [-0.6409932971000671, -0.1841365098953247]
REFERENCE_LOG_PROBS = [-0.6441552639007568, -0.1851443201303482]
KL = [1.3743381259700982e-06, 2.973649498017039e-05]
LOSSES = {1e-4: [-2.000200033187866, 1.5015124082565308], 0.05: [-2.006333827972412, 1.5015124082565308]}


def official_step() -> Step:
    t, following = torch.tensor([LEVELS[0], LEVELS[3]]), torch.tensor([LEVELS[1], LEVELS[4]])
    return Step(t, following, sde_scale(t, 0.7, LEVELS[1]))


def test_a_step_is_the_official_one():
    step = official_step()
    assert step.scale.tolist() == pytest.approx(SCALES, rel=1e-5)
    mean = step_mean(LATENTS, VELOCITY, step)
    torch.testing.assert_close(mean, MEAN, rtol=1e-5, atol=1e-6)
    assert log_probability(END, mean, step.std).tolist() == pytest.approx(LOG_PROBS, rel=1e-5)
    reference = step_mean(LATENTS, REFERENCE, step)
    assert log_probability(END, reference, step.std).tolist() == pytest.approx(REFERENCE_LOG_PROBS, rel=1e-5)
    assert kl_term(mean, reference, step).tolist() == pytest.approx(KL, rel=1e-3)


@pytest.mark.parametrize("clip", LOSSES)
def test_the_clipped_loss_is_the_official_one(clip):
    ratio = (torch.tensor(LOG_PROBS) - torch.tensor(REFERENCE_LOG_PROBS)).exp()
    assert clipped_surrogate(ratio, ADVANTAGES, clip).tolist() == pytest.approx(LOSSES[clip], rel=1e-6)


def test_log_probability_and_divergence_are_those_of_a_normal_distribution():
    step = official_step()
    mean, reference = step_mean(LATENTS, VELOCITY, step), step_mean(LATENTS, REFERENCE, step)
    ours, theirs = (Normal(at, step.std[:, None]) for at in (mean, reference))
    torch.testing.assert_close(log_probability(END, mean, step.std), ours.log_prob(END).mean(1))
    divergence = torch.distributions.kl_divergence(ours, theirs).mean(1)
    torch.testing.assert_close(kl_term(mean, reference, step), divergence * (step.t - step.following))


def test_without_noise_a_step_is_eulers():
    t, following = torch.tensor([1.0, 0.6]), torch.tensor([0.9, 0.5])
    step = Step(t, following, torch.zeros(2))
    torch.testing.assert_close(step_mean(LATENTS, VELOCITY, step), LATENTS - 0.1 * VELOCITY)
    assert step.std.tolist() == [0, 0]


def test_many_small_stochastic_steps_keep_the_distribution_of_the_path():
    """On N(0.7, 0.5^2), whose velocity is known: the standard deviation at level 0.4, from noise in 400 steps."""
    generator, mean, width = torch.Generator().manual_seed(0), 0.7, 0.5
    levels = torch.linspace(1, 0.4, 401).tolist()
    z = torch.randn(20_000, 1, generator=generator)
    for level, following in zip(levels, levels[1:]):
        t = torch.full((len(z),), level)
        variance = (1 - level) ** 2 * width**2 + level**2
        slope = (level - (1 - level) * width**2) / variance
        velocity = -mean + slope * (z - (1 - level) * mean)  # E[eps - z_0 | z_t]
        step = Step(t, t - level + following, sde_scale(t, 0.7, levels[1]))
        z = step_mean(z, velocity, step) + step.std[:, None] * torch.randn(z.shape, generator=generator)
    assert float(z.mean()) == pytest.approx(0.6 * mean, abs=0.02)
    assert float(z.std()) == pytest.approx((0.6**2 * width**2 + 0.4**2) ** 0.5, rel=0.03)


def test_windows_are_drawn_evenly_and_alike_for_a_group():
    starts = [start for epoch in range(60) for start in window_starts(0, epoch, list(range(10)), 5, 2).tolist()]
    assert {start: starts.count(start) > 100 for start in sorted(set(starts))} == dict.fromkeys(range(4), True)
    assert window_starts(0, 3, [7, 2, 7], 5, 2).tolist() == [starts[3 * 10 + group] for group in (7, 2, 7)]
    assert window_starts(3, 7, list(range(9)), 4, 4).tolist() == [0] * 9


def moved(trainer):
    """The trainer with adapters that do something, in the policy that samples too."""
    policy, generator = trainer.learner.policy, torch.Generator().manual_seed(0)
    for tensor in policy.tensors("current").values():
        tensor.data = tensor.data + 0.05 * torch.randn(tensor.shape, generator=generator)
    policy.copy("current", "old")
    return trainer


@pytest.fixture
def flow(make_trainer, tmp_path):
    return lambda *more: moved(make_trainer(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", *FLOW_GRPO, *more))


@torch.no_grad()
def velocity_at(trainer, rollout, latents, places):
    learner, sigmas = trainer.learner, torch.tensor(trainer.objective.sigmas)
    return learner.generator.velocity(latents, sigmas[places], rollout.conditions, learner.network).float()


@pytest.mark.parametrize("more", [("train.sde_within=3", "rollout.groups=3"), ("train.sde_within=1", *STOPPED)])
def test_a_rollout_is_eulers_outside_its_window_and_keeps_the_steps_inside(flow, more):
    trainer = flow(*more)
    (rollout, *_) = trainer.collector.collect(0)
    objective, generator, samples = trainer.objective, trainer.learner.generator, rollout.samples
    sigmas, starts = objective.sigmas, objective.starts(0, samples)
    stops = rollout_stops(trainer.recipe.rollout, 0, 0, samples)
    assert rollout.path.shape == (len(samples), 2, *generator.latent_shape)
    for row, (start, stop) in enumerate(zip(starts.tolist(), stops)):
        own = rollout.conditions.select(torch.tensor([row]))
        noise = randomness.noise(generator.latent_shape, 0, randomness.ROLLOUT, 0, [samples[row]])
        before = sample(generator, generator.transformer, own, noise, sigmas[: start + 1]) if start else noise
        torch.testing.assert_close(rollout.path[row, :1], before, rtol=0, atol=1e-5)
        ended, rest = rollout.path[row, 1:], sigmas[start + 1 : stop + 1]
        ended = sample(generator, generator.transformer, own, ended, rest) if len(rest) > 1 else ended
        torch.testing.assert_close(rollout.anchor[row][None], ended, rtol=0, atol=1e-5)
        assert rollout.taus[row] == sigmas[stop]
    # The step inside: the official formula once more, with the noise of its address.
    t, following = (torch.tensor(sigmas)[starts + more].view(-1, 1, 1, 1) for more in (0, 1))
    z, v = rollout.path[:, 0], velocity_at(trainer, rollout, rollout.path[:, 0], starts)
    scale = 0.7 * (t / (1 - torch.where(t == 1, sigmas[1], t))).sqrt()
    drift = v + scale**2 / (2 * t) * (z + (1 - t) * v)
    drawn = [
        randomness.noise(generator.latent_shape, 0, randomness.SDE, 0, [n], place)
        for n, place in zip(samples, starts.tolist())
    ]
    expected = z + drift * (following - t) + scale * (t - following).sqrt() * torch.cat(drawn)
    torch.testing.assert_close(rollout.path[:, 1], expected, rtol=0, atol=1e-5)
    density = Normal(z + drift * (following - t), scale * (t - following).sqrt()).log_prob(rollout.path[:, 1])
    torch.testing.assert_close(rollout.log_probs[:, 0], density.mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    assert rollout.log_probs.isfinite().all() and float(rollout.path.std()) > 0.3


def gradient(trainer, rollout, worth) -> dict[str, torch.Tensor]:
    object.__setattr__(rollout, "worth", worth)
    for compute in trainer.objective.losses(rollout, 0):
        compute()[0].backward()
    found = {}
    for key, matrix in trainer.learner.policy.tensors("current").items():
        found[key] = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad.clone()
        matrix.grad = None
    return found


def apart(first, second) -> float:
    one, other = (torch.cat([tensor.flatten() for tensor in found.values()]) for found in (first, second))
    assert one.norm() > 0
    return float((one - other).norm() / one.norm())


def test_at_the_policy_that_sampled_the_gradient_is_that_of_the_weighted_log_probability(flow):
    trainer = flow("train.sde_steps=2", "train.sde_within=2", "train.beta_kl=0", "rollout.groups=1")
    (rollout,) = trainer.collector.collect(0)
    worth = torch.tensor([3.0, -1.0, 0.5, -2.0])
    found = gradient(trainer, rollout, worth)
    sigmas = trainer.objective.sigmas
    for place in range(2):
        t, following = (torch.full((4, 1, 1, 1), sigmas[place + more]) for more in (0, 1))
        z, end = rollout.path[:, place], rollout.path[:, place + 1]
        network = trainer.learner.generator
        v = network.velocity(z, t.flatten(), rollout.conditions, network.transformer).float()
        scale = 0.7 * (t / (1 - min(sigmas[place], sigmas[1]))).sqrt()
        mean = z + (v + scale**2 / (2 * t) * (z + (1 - t) * v)) * (following - t)
        density = Normal(mean, scale * (t - following).sqrt()).log_prob(end).mean((1, 2, 3))
        (-(worth * density).sum()).backward()
    by_hand = {key: matrix.grad for key, matrix in trainer.learner.policy.tensors("current").items()}
    by_hand = {key: torch.zeros_like(found[key]) if tensor is None else tensor for key, tensor in by_hand.items()}
    assert apart(by_hand, found) < 1e-4


def test_the_ratio_is_1_at_first_and_then_counts_from_the_rollout(flow):
    trainer = flow("train.sde_clip=1e-6", "train.beta_kl=0")
    (rollout, *_) = trainer.collector.collect(0)
    object.__setattr__(rollout, "worth", torch.ones(4))

    def terms() -> list[float]:
        return trainer.objective.losses(rollout, 0)[0]()[1].tolist()

    assert terms() == [-4, 0, 0]
    trainer.learner.policy.old_is_current = False
    policy, _, clipped = terms()
    assert policy == pytest.approx(-4, abs=1e-4), "the same policy, but for rounding"
    for index, matrix in enumerate(trainer.learner.policy.tensors("current").values()):
        matrix.data += 0.05 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(index))
    policy, _, clipped = terms()
    assert clipped == 4 and abs(policy + 4) > 1e-3


def test_the_base_models_term_is_the_divergence_from_its_step(flow):
    trainer = flow("train.beta_kl=0.5")
    (rollout, *_) = trainer.collector.collect(0)
    object.__setattr__(rollout, "worth", torch.ones(4))
    loss, (policy, kl, _) = trainer.objective.losses(rollout, 0)[0]()
    step = trainer.objective.step(trainer.objective.starts(0, rollout.samples), torch.ones(4), torch.device("cpu"))
    starts, z = trainer.objective.starts(0, rollout.samples), rollout.path[:, 0]
    ours = step_mean(z, velocity_at(trainer, rollout, z, starts), step)
    with trainer.learner.policy.using(None):
        reference = step_mean(z, velocity_at(trainer, rollout, z, starts), step)
    expected = (ours - reference).square().mean((1, 2, 3)) / (2 * step.scale**2)
    assert float(kl) == pytest.approx(float(expected.sum()), rel=1e-4) and float(kl) > 0
    assert float(loss.detach()) == pytest.approx(float(policy + 0.5 * kl), rel=1e-5)


def test_steps_on_the_same_samples_make_the_better_ones_likelier(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", *FLOW_GRPO, "train.learning_rate=5e-4", "train.sde_clip=1")
    rollouts = trainer.collector.collect(0)
    losses = [trainer.objective.learn(rollouts, 0).metrics["train/policy_loss"] for _ in range(5)]
    assert losses[0] == pytest.approx(0, abs=1e-6), "at ratio 1 the loss is the mean advantage"
    assert all(later < earlier for earlier, later in zip(losses, losses[1:])), losses


def test_recut_rollouts_keep_their_steps(flow):
    trainer = flow("rollout.micro_batch=4")
    rollouts = trainer.collector.collect(0)
    for cut in recut(rollouts, [[0, 1, 2], [3, 4, 5], [6, 7]]):
        for row, n in enumerate(cut.samples):
            assert torch.equal(cut.path[row], rollouts[n // 4].path[n % 4])
            assert torch.equal(cut.log_probs[row], rollouts[n // 4].log_probs[n % 4])


@pytest.mark.parametrize(
    "settings, told",
    [
        (("rollout.solver=dpm2",), "needs rollout.solver=euler, got 'dpm2'"),
        (("train.old_schedule=1",), "needs train.old_schedule=0"),
        (("train.sde_steps=0",), "train.sde_steps must be at least 1"),
        (("train.sde_steps=3",), r"train.sde_steps must be at most train.sde_within \(2\), got 3"),
        (("train.sde_within=4",), "train.sde_within must be at most the 3 solver steps that every rollout has, got 4"),
        (STOPPED, "train.sde_within must be at most the 1 solver steps that every rollout has, got 2"),
        (("train.sde_noise=0",), "train.sde_noise must be positive and finite"),
        (("train.sde_clip=0",), "train.sde_clip must be positive and finite"),
        (("rollout.group_size=1",), "rollout.group_size must be at least 2"),
        (("train.levels_per_sample=2",), "train.levels_per_sample is not read where train.objective is flow_grpo"),
        (("train.reference_share=1",), "train.reference_share is not read"),
        (("train.beta=.5",), "train.beta is not read"),
        (("train.draft_steps=2",), "train.draft_steps is not read"),
        (("train.objective=draft", "train.sde_steps=2"), "train.sde_within is not read where train.objective is draft"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(overrides, tmp_path, settings, told):
    with pytest.raises(InputError, match=told) as refused:
        load_recipe("recipes/shapes/aesthetic.yaml", overrides(tmp_path, *FLOW_GRPO, *settings))
    assert "\n" not in str(refused.value)


def test_the_plan_counts_the_steps_and_the_latents_that_are_kept():
    base = ["train.objective=flow_grpo", "train.sde_within=5"]
    two, four = (load_recipe("recipes/shapes/aesthetic.yaml", [*base, f"train.sde_steps={n}"]) for n in (2, 4))
    found = costs(two)
    phases = work(two, recipe_geometry(two, 1), found)
    assert phases["rollout"] == pytest.approx(64 * 10 * found.forward_flops / 1e12)
    assert phases["train"] == pytest.approx(64 * 2 * found.training_flops / 1e12)
    assert "2 stochastic steps within the first 5, noise 0.7, clip 0.0001" in "\n".join(work_lines(two, 1))
    more = memory(four)["train"] - memory(two)["train"]
    assert more == pytest.approx(64 * 2 * 4 * 16 * 8 * 8 / 2**30, rel=1e-6)
