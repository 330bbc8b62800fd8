"""A second family in training: a guidance-distilled model on full and on stopped rollouts, by both objectives."""

from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from safetensors.torch import load_file

from nft.config import load_recipe
from nft.cost.micro_batch import print_plan
from tests.tiny import DRAFT, STOPPED

RECIPE = "recipes/shapes/flux_aesthetic.yaml"
VALUE = "rewards=[{kind: value, value_model: miniature/weights/value/flux/aesthetic}]"
KINDS = {
    "full": ("train.updates_per_epoch=2", "train.learning_rate=1e-3"),
    "stopped": (*STOPPED, VALUE, "train.learning_rate=1e-3"),
    "draft": (*DRAFT, "train.draft_steps=2", "train.learning_rate=1e-3"),
}


def slow(value) -> ParameterSet:
    return pytest.param(value, marks=pytest.mark.slow)


LAYERS = 3 * 8 + 5 * 3  # eight projections per double block, three per single block


@pytest.fixture(scope="module", params=KINDS)
def straight(request, train, tmp_path_factory) -> tuple[str, Path]:
    """The kind and the folder of a run of two epochs that nothing disturbs."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    train(run, *KINDS[request.param], "epochs=2", "checkpoint.keep=2", recipe=RECIPE)
    return request.param, run


def test_a_run_trains_and_leaves_a_lora_file_for_all_attention_layers(straight, rows, adapters):
    kind, run = straight
    first, *rest = rows(run)
    assert len(rest) == 2 and "held_out/aesthetic" in first
    for row in rest:
        assert row["train/gradient_norm"] > 0 and row["reward/total_std"] > 0
        assert ("audit/spearman" in row) == (kind == "stopped")
        assert ("train/old_deviation" in row) == (kind != "draft")
    before, after = adapters(run, 1), adapters(run, 2)
    changed = [key for key in after if key.startswith("current/") and not torch.equal(before[key], after[key])]
    assert len(changed) > LAYERS
    file = load_file(run / "lora.safetensors")
    assert len(file) == 2 * LAYERS and all(key.startswith("transformer.") for key in file)
    assert any("single_transformer_blocks" in key for key in file)


@pytest.mark.slow
@pytest.mark.parametrize("straight", [slow("full"), "stopped", slow("draft")], indirect=True)
def test_a_run_that_was_stopped_continues_bit_for_bit(straight, train, digests, rows, tmp_path):
    kind, run = straight
    train(tmp_path / "run", *KINDS[kind], "epochs=1", recipe=RECIPE)
    train(tmp_path / "run", *KINDS[kind], "epochs=2", "checkpoint.keep=2", recipe=RECIPE)
    assert digests(tmp_path / "run", 2) == digests(run, 2)
    assert rows(tmp_path / "run")[-1] == rows(run)[-1]


def test_rollouts_training_and_evaluation_are_given_the_same_guidance(make_trainer, tmp_path):
    trainer, given = make_trainer(tmp_path / "run", "epochs=1", "model.guidance=2.5", recipe=RECIPE), []

    def record(module, arguments, named):
        phase = "train" if torch.is_grad_enabled() else "sample"
        given.append((phase, *named["guidance"].unique().tolist()))

    trainer.learner.generator.transformer.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train()
    assert set(given) == {("train", 2.5), ("sample", 2.5)}


def test_the_value_model_runs_on_the_blocks_of_the_generator(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", *KINDS["stopped"], recipe=RECIPE)
    model = trainer.auditor.scorer.values["aesthetic"]
    assert model.backbone.network is trainer.learner.generator.transformer
    rollouts = trainer.collector.collect(0)
    scores = torch.cat([rollout.rewards["total"] for rollout in rollouts])
    with torch.no_grad():
        for tensor in trainer.learner.policy.tensors("current").values():
            tensor.add_(0.1)
    again = torch.cat([rollout.rewards["total"] for rollout in trainer.collector.collect(0)])
    assert scores.std() > 0 and torch.equal(scores, again)


# Parameters of the transformer, adapted layers.
PUBLISHED = {"flux": ("11,901,408,320", 266), "sd35l": ("8,056,627,520", 303)}
RECIPES = [Path("recipes/flux/aesthetic.yaml"), Path("recipes/sd35l/draft.yaml")]
MORE = [Path("recipes/flux/draft.yaml"), Path("recipes/sd35l/aesthetic.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [*RECIPES, *(pytest.param(path, marks=pytest.mark.exhaustive) for path in MORE)], ids=str
)
def test_the_plan_of_a_published_model_tells_its_size_memory_and_flops(path, capsys):
    parameters, layers = PUBLISHED[path.parent.name]
    recipe = load_recipe(path)
    print_plan(recipe, 8)
    plan = capsys.readouterr().out
    assert f"{parameters} parameters in the transformer" in plan and f"{layers} layers" in plan
    for phase in ("encode", "rollout", "train", "optimizer", "evaluate"):
        assert f"memory       {phase}: about " in plan
    assert "FLOPs        one sample: forward " in plan and "TFLOP" in plan
    assert ("embedded guidance 3.5" in plan) == (path.parent.name == "flux")
