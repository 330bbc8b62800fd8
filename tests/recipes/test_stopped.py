"""Runs on stopped rollouts: scored by a value model, audited, resumed, and refused where they make no sense."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nft.config import load_recipe
from nft.preflight import check_recipe
from stitchvm_reward.errors import InputError
from tests.tiny import EARLY

RECIPE = "recipes/shapes/aesthetic.yaml"


@pytest.fixture(scope="session")
def stopped(aesthetic_folder):
    """stopped(folder) -> overrides that make a recipe stop early and score by that value model."""

    def of(folder=aesthetic_folder):
        return f"rewards=[{{kind: value, value_model: {folder}}}]", *EARLY

    return of


def test_a_run_on_stopped_rollouts_trains_audits_and_evaluates_on_images(train, tmp_path, stopped, rows):
    trainer = train(tmp_path / "run", *stopped(), "epochs=2")
    first, *rest = rows(tmp_path / "run")
    assert "held_out/aesthetic" in first and first["held_out/aesthetic"] != 0
    for row in rest:
        assert {"audit/spearman", "audit/bias", "audit/slope", "audit/value", "audit/reward"} <= row.keys()
    assert rest[1]["train/old_deviation"] >= 0 and rest[0]["train/gradient_norm"] > 0
    rollouts = trainer.collector.collect(0)
    assert {float(t) for r in rollouts for t in r.tau} <= {
        float(torch.tensor(trainer.objective.sigmas[k])) for k in (1, 2)
    }
    assert trainer.held_out.scorer.values["aesthetic"].backbone.network is trainer.learner.generator.transformer


def test_values_do_not_depend_on_the_adapters(make_trainer, tmp_path, stopped):
    trainer = make_trainer(tmp_path / "run", *stopped())
    before = torch.cat([r.rewards["total"] for r in trainer.collector.collect(0)])
    with torch.no_grad():
        for tensor in trainer.learner.policy.tensors("current").values():
            tensor.add_(0.1)
    trainer.learner.policy.old_is_current = False
    assert torch.equal(before, torch.cat([r.rewards["total"] for r in trainer.collector.collect(0)]))


@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit(train, tmp_path, stopped, digests, rows):
    train(tmp_path / "straight", *stopped(), "epochs=3")
    train(tmp_path / "broken", *stopped(), "epochs=1")
    train(tmp_path / "broken", *stopped(), "epochs=3")
    assert digests(tmp_path / "broken", 3) == digests(tmp_path / "straight", 3)
    assert rows(tmp_path / "broken")[-1] == rows(tmp_path / "straight")[-1]


def test_drift_stops_the_run_with_one_line(train, tmp_path, stopped):
    with pytest.raises(InputError, match=r"audit in epoch 1: .*the run stops here \(audit.on_drift\)"):
        train(tmp_path / "run", *stopped(), "audit.least_spearman=1", "audit.on_drift=stop", "epochs=2")


def test_a_value_model_of_another_size_is_refused_before_anything_is_loaded(overrides, tmp_path, stopped):
    recipe = load_recipe(RECIPE, overrides(tmp_path / "run", *stopped(), "model.resolution=128"))
    with pytest.raises(InputError, match=r"is for 64 px, model\.resolution is 128"):
        check_recipe(recipe)


@pytest.mark.slow
def test_a_value_model_whose_backbone_reads_prompts_scores_by_them(make_trainer, tmp_path, stopped, stitch, overrides):
    more = ("backbone.block=2", "reward.block=1", "backbone.conditioning=prompt")
    folder = stitch("aesthetic", tmp_path / "prompted" / "stitch", *more)
    trainer = make_trainer(tmp_path / "run", *stopped(folder))
    rollout, another = trainer.collector.collect(0)[:2]
    own, others = rollout.conditions, another.conditions
    model = next(iter(trainer.held_out.scorer.values.values()))
    with torch.no_grad(), trainer.learner.policy.using(None):
        found = [model.score(rollout.anchor, rollout.tau, conditions=c) for c in (own, others)]
    assert torch.equal(rollout.rewards["total"], found[0])
    assert not torch.equal(found[0], found[1])
    recipe = load_recipe(RECIPE, overrides(tmp_path / "other", *stopped(folder), "model.text_length=20"))
    with pytest.raises(InputError, match=r"reads prompts of 13 tokens, model\.text_length is 20"):
        check_recipe(recipe)


def test_a_value_model_that_is_cut_short_is_refused(make_trainer, tmp_path, stopped, aesthetic_folder):
    shutil.copytree(aesthetic_folder, tmp_path / "value_model")
    tensors = load_file(tmp_path / "value_model/model.safetensors")
    tensors.pop("null.pooled")
    save_file(tensors, tmp_path / "value_model/model.safetensors")
    with pytest.raises(InputError, match=r"value_model is damaged: 'pooled'"):
        make_trainer(tmp_path / "run", *stopped(tmp_path / "value_model"))
    assert not (tmp_path / "run").exists()
