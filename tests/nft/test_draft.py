"""Direct reward fine-tuning against gradients that are written out here, on the miniature."""

import pytest
import torch

from nft.config import load_recipe
from nft.cost.memory import memory
from nft.cost.plan import recipe_geometry, work, work_lines
from nft.cost.shapes import costs
from nft.objectives.draft import draft_loss
from nft.rollout import rollout_stops, sample
from stitchvm_reward.errors import InputError
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.runs import randomness
from tests.tiny import DRAFT, STOPPED

# Samples that stop after one step and samples that stop after two in one micro batch.
BOTH = ("rollout.groups=8", "rollout.group_size=1", "rollout.micro_batch=8")
CASES = {
    "last": ("train.draft_steps=1",),
    "all": ("train.draft_steps=3",),
    "stopped": ("train.draft_steps=1", *STOPPED, *BOTH),
}


def moved(trainer):
    """The trainer with adapters that do something, and rollouts of that policy."""
    policy, generator = trainer.learner.policy, torch.Generator().manual_seed(0)
    for tensor in policy.tensors("current").values():
        tensor.data = tensor.data + 0.05 * torch.randn(tensor.shape, generator=generator)
    policy.copy("current", "old")
    return trainer


@pytest.fixture
def draft(make_trainer, tmp_path):
    return lambda *more: moved(make_trainer(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", *DRAFT, *more))


def taken(trainer) -> dict[str, torch.Tensor]:
    """The matrices' gradients, which are cleared."""
    found = {}
    for key, matrix in trainer.learner.policy.tensors("current").items():
        found[key] = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad.clone()
        matrix.grad = None
    return found


def gradient(trainer) -> dict[str, torch.Tensor]:
    """The gradient of the summed loss of the first epoch's samples."""
    for rollout in trainer.collector.collect(0):
        trainer.objective.loss(rollout, 0)[0].backward()
    return taken(trainer)


def stops_of(trainer, samples: list[int]) -> list[int]:
    """After how many steps the rollouts of the first epoch end."""
    return rollout_stops(trainer.recipe.rollout, trainer.recipe.seed, 0, samples)


def by_hand(trainer) -> dict[str, torch.Tensor]:
    """The same, one sample at a time, with nothing of the trainer's but its networks."""
    train, generator, policy = trainer.recipe.train, trainer.learner.generator, trainer.learner.policy
    network, vae, scorer = generator.transformer, generator.vae, trainer.auditor.scorer
    sigmas = generator.sigmas(trainer.recipe.rollout.steps)
    for rollout in trainer.collector.collect(0):
        for place, n in enumerate(rollout.samples):
            own: Conditions = rollout.conditions.select(torch.tensor([place]))
            text = trainer.collector.prompts[rollout.prompts[place]]
            z = randomness.noise(generator.latent_shape, 0, randomness.ROLLOUT, 0, [n])
            (stop,), distances = stops_of(trainer, [n]), []

            def velocity(z, sigma, own=own):
                t = torch.tensor([sigma * 1000], dtype=torch.float32)
                return network(z, own["tokens"], own["pooled"], timestep=t, return_dict=False)[0]

            for step, (sigma, following) in enumerate(zip(sigmas[:stop], sigmas[1:])):
                with torch.set_grad_enabled(step >= stop - train.draft_steps):
                    v = velocity(z, sigma)
                if v.requires_grad:
                    with torch.no_grad(), policy.using(None):
                        reference = velocity(z, sigma)
                    distances.append((v - reference).square().mean())
                z = z + (following - sigma) * v
            if trainer.recipe.rollout.stop_window:
                with policy.using(None):
                    reward = scorer.values["aesthetic"].score(z, sigmas[stop])[0]
            else:
                images = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample
                reward = scorer.rewards["aesthetic"].score((images / 2 + 0.5).clamp(0, 1), [text])[0]
            assert len(distances) == train.draft_steps
            (-reward + train.beta_kl * sum(distances) / len(distances)).backward()
    return taken(trainer)


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The distance of two gradients as a share of the first."""
    one, other = (torch.cat([tensor.flatten() for tensor in found.values()]) for found in (first, second))
    assert one.norm() > 0
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_one_written_out(draft, case):
    trainer = draft(*CASES[case], "train.beta_kl=20")  # of the size of the reward's own gradient
    found = gradient(trainer)
    assert apart(found, by_hand(trainer)) < 1e-4
    if case == "stopped":
        assert sorted(set(stops_of(trainer, list(range(8))))) == [1, 2], "the case needs samples of different stops"


@pytest.mark.slow
def test_more_steps_and_the_reference_have_gradients_of_their_own(draft):
    usual = gradient(draft())
    assert apart(usual, gradient(draft("train.draft_steps=2"))) > 0.1
    assert apart(usual, gradient(draft("train.beta_kl=20"))) > 0.1
    assert apart(usual, gradient(draft("train.beta_kl=0"))) > 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), STOPPED])
def test_checkpointed_steps_give_the_same_gradient_and_keep_less(draft, more):
    def kept(trainer) -> int:
        sizes = []
        rollout = trainer.collector.collect(0)[0]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            trainer.objective.loss(rollout, 0)
        return sum(sizes)

    steps = () if more else ("train.draft_steps=3",)
    plain, lean = (draft(*more, *steps, f"train.gradient_checkpointing={on}") for on in ("false", "true"))
    assert apart(gradient(plain), gradient(lean)) < 1e-5
    assert kept(lean) < 0.8 * kept(plain)


@pytest.mark.parametrize("more", [(), (*STOPPED, *BOTH)])
def test_a_micro_batch_size_changes_nothing(draft, more):
    sizes = [gradient(draft(*more, f"rollout.micro_batch={size}")) for size in (8, 3)]
    assert apart(*sizes) < 1e-5


@pytest.mark.parametrize("more", [("train.draft_steps=2",), (*STOPPED, *BOTH)])
def test_the_last_steps_lead_where_the_sampler_leads_and_fill_in_the_rollout(draft, more):
    trainer = draft(*more)
    learner, generator = trainer.learner, trainer.learner.generator
    (begun, *_) = trainer.collector.collect(0)
    assert not begun.rewards
    stops, sigmas = stops_of(trainer, begun.samples), generator.sigmas(trainer.recipe.rollout.steps)
    noise = randomness.noise(generator.latent_shape, 0, randomness.ROLLOUT, 0, begun.samples)
    whole = sample(generator, learner.network, begun.conditions, noise, sigmas, stops=stops)
    loss, parts = trainer.objective.loss(begun, 0)
    rollout = trainer.objective.finished[begun.samples[0]]
    torch.testing.assert_close(rollout.anchor, whole, rtol=0, atol=1e-5)
    assert rollout.tau.tolist() == pytest.approx([sigmas[stop] for stop in stops])
    with torch.no_grad():
        expected = trainer.objective.parts.score(rollout)
    for name, scores in rollout.rewards.items():
        torch.testing.assert_close(scores, expected[name])
        assert not scores.requires_grad
    assert not rollout.anchor.requires_grad
    assert float(parts[0]) == pytest.approx(-float(expected["total"].sum()), rel=1e-5) and float(parts[1]) > 0
    assert float(loss) == pytest.approx(float(parts[0] + 0.01 * parts[1]), rel=1e-6)


def test_the_loss_is_the_reward_less_the_weighed_distance_over_all_steps():
    reward = torch.tensor([1.0, -2.0], requires_grad=True)
    velocities, references = torch.zeros(3, 2, 4, requires_grad=True), torch.ones(3, 2, 4, requires_grad=True)
    with torch.no_grad():
        velocities[2, 1] = 3.0
    policy, kl = draft_loss(reward, velocities, references)
    assert policy.tolist() == [-1, 2]
    assert kl.tolist() == pytest.approx([1, (1 + 1 + 4) / 3])
    (policy + 0.5 * kl).sum().backward()
    assert reward.grad.tolist() == [-1, -1] and references.grad is None
    assert velocities.grad[2, 1].tolist() == pytest.approx([0.5 * 2 * 2 / 12] * 4)
    assert draft_loss(reward, velocities, None)[1].tolist() == [0, 0]
    _, half = draft_loss(reward, torch.full((1, 2, 4), 1e-4).half(), torch.zeros(1, 2, 4).half())
    assert half.tolist() == pytest.approx([1e-8] * 2, rel=1e-2)


@pytest.mark.parametrize("more", [(), STOPPED])
def test_steps_on_the_same_samples_raise_their_reward(make_trainer, tmp_path, more):
    trainer, rewards = make_trainer(tmp_path / "run", *DRAFT, *more, "train.learning_rate=5e-4"), []
    for _ in range(5):
        rollouts = trainer.objective.learn(trainer.collector.collect(0), 0).rollouts
        trainer.learner.policy.after_epoch(0, trainer.learner.step)
        rewards.append(float(torch.cat([rollout.rewards["total"] for rollout in rollouts]).mean()))
    assert all(later > earlier for earlier, later in zip(rewards, rewards[1:])), rewards
    assert rewards[-1] > rewards[0] + 0.2


@pytest.mark.parametrize(
    "settings, told",
    [
        (("rollout.solver=dpm2",), "needs rollout.solver=euler, got 'dpm2'"),
        (("train.old_schedule=1",), "needs train.old_schedule=0"),
        (("train.draft_steps=0",), "train.draft_steps must be at least 1"),
        (("train.draft_steps=4",), "at most the 3 solver steps that every rollout has, got 4"),
        (("train.draft_steps=2", *STOPPED), "at most the 1 solver steps that every rollout has, got 2"),
        (("train.levels=continuous",), "train.levels is not read where train.objective is draft: leave it at grid"),
        (("train.levels_per_sample=2",), "train.levels_per_sample is not read"),
        (("train.space=velocity",), "train.space is not read"),
        (("train.beta=.5",), "train.beta is not read"),
        (("train.per_group_std=true",), "train.per_group_std is not read"),
        (("train.objective=nft", "train.draft_steps=2"), "train.draft_steps is not read where train.objective is nft"),
        (("train.objective=drafts",), "train.objective must be one of nft, draft, awm, flow_grpo, got 'drafts'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(overrides, tmp_path, settings, told):
    with pytest.raises(InputError) as refused:
        load_recipe("recipes/shapes/aesthetic.yaml", overrides(tmp_path, *DRAFT, *settings))
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_group_may_be_a_single_sample(overrides, tmp_path):
    given = overrides(tmp_path, *DRAFT, "rollout.group_size=1")
    assert load_recipe("recipes/shapes/aesthetic.yaml", given).rollout.group_size == 1


@pytest.mark.slow
def test_the_plan_counts_what_is_run():
    recipe = load_recipe("recipes/draft_pixel.yaml", ["train.draft_steps=3"])
    found = costs(recipe)
    forward, decode = found.forward_flops / 1e12, found.decode_flops / 1e12
    phases = work(recipe, recipe_geometry(recipe, 1), found)
    samples = recipe.rollout.groups * recipe.rollout.group_size
    assert phases["rollout"] == pytest.approx(samples * 7 * forward)
    assert phases["train"] == pytest.approx(samples * 3 * (found.training_flops / 1e12 + forward))
    # Frozen weights have no gradient of their own: a backward pass costs about as much as the forward pass.
    assert phases["decode"] == pytest.approx(2 * samples * decode, rel=0.05)
    assert phases["score"] == pytest.approx(2 * samples * found.score_flops / 1e12, rel=0.05)
    assert "through the last 3 solver steps" in "\n".join(work_lines(recipe, 2))
    small, whole = (
        memory(load_recipe("recipes/shapes/draft.yaml", [f"train.gradient_checkpointing={kept}"]))
        for kept in ("true", "false")
    )
    assert small["train"] < 0.6 * whole["train"]


def test_the_plan_of_stopped_rollouts_decodes_nothing():
    recipe = load_recipe("recipes/shapes/draft_stopped.yaml", ["train.beta_kl=0"])
    found = costs(recipe)
    phases = work(recipe, recipe_geometry(recipe, 1), found)
    assert phases["rollout"] == pytest.approx(64 * 4 * found.forward_flops / 1e12) and phases["decode"] == 0
    assert phases["train"] == pytest.approx(64 * found.training_flops / 1e12)
    assert 1.5 * 64 * found.score_flops / 1e12 < phases["score"] < 3 * 64 * found.score_flops / 1e12


def test_an_update_waits_for_the_device_only_where_it_begins_and_ends(draft, monkeypatch):
    trainer, waits = draft(), []
    rollouts = trainer.collector.collect(0)
    assert len(rollouts) > 1
    monkeypatch.setattr(trainer.timings, "synchronise", lambda: waits.append(trainer.timings.current))
    trainer.objective.learn(rollouts, 0)
    assert waits == ["train", "train"]
