"""The worked examples of docs/extending.md do what they say."""

import csv
import importlib
import re
import sys

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from stitchvm_reward.errors import InputError
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.rewards import load_reward
from stitchvm_reward.rewards.recipe import RewardRecipe
from tests.docs.checker import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """example(name) -> the module that the page shows under this name."""
    text = (ROOT / "docs/extending.md").read_text()
    monkeypatch.syspath_prepend(tmp_path)

    def load(name: str):
        found = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        assert found is not None, f"docs/extending.md has no example called {name}"
        (tmp_path / f"example_{name}.py").write_text(found[1])
        sys.modules.pop(f"example_{name}", None)
        return importlib.import_module(f"example_{name}")

    return load


def test_the_reward_scores_takes_options_and_refuses_others(example):
    example("reward")
    reward = load_reward(RewardRecipe(kind="example_reward:Brightness", options={"target": 0.7}), CPU)
    images = torch.tensor([0.7, 0.2]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(reward.score(images, ["a", "b"]), torch.tensor([0.0, -0.5]))
    with pytest.raises(InputError, match="no option traget: did you mean 'target'"):
        load_reward(RewardRecipe(kind="example_reward:Brightness", options={"traget": 0.7}), CPU)


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return network.eval()


@torch.no_grad()
def test_the_family_runs_its_network_whole_in_parts_and_cut_off(example, network):
    family = example("family").AuraFlow()
    latents, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    conditions = Conditions({"tokens": torch.randn(2, 5, 12)})
    output = network(**family.inputs(latents, sigma, conditions, None))[0]
    whole = family.velocity(output, tuple(latents.shape))
    assert whole.shape == latents.shape
    start = family.embed(network, latents, sigma, conditions, None)
    for block in range(5):
        assert torch.equal(start.run_to(block).finish(), whole), f"block {block}"
    features = start.run_to(3).features()
    assert features.shape == (2, family.width(network), 4, 4)
    family.truncate(network, 3)
    assert len(family.blocks(network)) == 3
    assert torch.equal(family.embed(network, latents, sigma, conditions, None).run_to(3).features(), features)


def test_the_familys_schedule_is_that_of_the_library(example):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    scheduler.set_timesteps(6)
    levels = example("family").AuraFlow().schedule({"shift": 1.73}, 6, (4, 8, 8))
    torch.testing.assert_close(torch.tensor(levels), scheduler.sigmas, rtol=1e-6, atol=1e-6)


def test_the_objective_takes_a_real_optimizer_step(example, tmp_path, make_trainer):
    module = example("objective")
    trainer = make_trainer(tmp_path / "run", "train.beta_kl=1e-4", "train.old_schedule=0")
    parts = trainer.objective.parts
    parts.train.sharpness = 1.0  # WeightedSettings would be a base of AllSettings
    module.WeightedSettings(sharpness=1.0).check()
    module.Weighted.check(parts.train, parts.rollout)
    before = {name: tensor.clone() for name, tensor in trainer.learner.tensors()["adapters"].items()}
    learned = module.Weighted(parts).learn(trainer.collector.collect(0), 0)
    after = trainer.learner.tensors()["adapters"]
    assert trainer.learner.step == 1 and any(not torch.equal(after[name], before[name]) for name in before)
    assert learned.metrics["train/policy_loss"] > 0 and learned.metrics["train/gradient_norm"] > 0
    assert module.Weighted(parts).worth(torch.tensor([2.0])).item() == pytest.approx(7.389, rel=1e-3)
    assert learned.metrics["train/weight_std"] > 0
    assert module.Weighted.cost(parts.train).frozen == 1
    assert "sharpness 1" in module.Weighted.describe(parts.train, parts.rollout, 2)[0]


def test_the_solver_is_of_second_order(example):
    step = example("solver").ab2_step

    def error(steps: int) -> float:
        levels = [1 - (n / steps) ** 1.2 for n in range(steps + 1)]
        latents, previous, before = torch.ones(1, dtype=torch.float64), None, None
        for sigma, following in zip(levels, levels[1:]):
            velocity = latents * 1.0  # dz/dt = z: from t = 1 to 0 it becomes z / e
            latents = step(latents, velocity, previous, (before, sigma, following))
            before, previous = sigma, velocity
        return abs(float(latents) - float(torch.tensor(-1.0, dtype=torch.float64).exp()))

    assert 3.3 < error(40) / error(80) < 4.7


def test_the_tracker_writes_rows_and_survives_a_restart(example, tmp_path):
    tracker = example("tracker").CommaSeparated(tmp_path, 0)
    for epoch in range(3):
        tracker.scalars(epoch, epoch, {"reward": float(epoch)})
    tracker.close()
    again = example("tracker").CommaSeparated(tmp_path, 2)
    again.scalars(2, 2, {"reward": 7.0, "new": 1.0})
    again.histogram(2, "optimality", torch.zeros(2))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["reward"]) for row in rows] == [("0", "0.0"), ("1", "1.0"), ("2", "7.0")]
