"""What used to give another result than was asked for, without a word."""

import argparse
import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from nft import reference
from nft.inputs import input_digests, require_unchanged
from nft.prompts import check_prompts
from stitchvm_reward.diffusion.prompt_cache import PromptCache, load_text_pipeline
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import SD3
from stitchvm_reward.files import json_text, write_json
from stitchvm_reward.runs import checkpoint
from stitchvm_reward.runs.recipe import CheckpointRecipe
from stitchvm_reward.runs.trackers.jsonl import JsonLines
from stitchvm_reward.runs.tracking import read_metrics
from stitchvm_reward.stitching.value_model import StitchedValueModel
from tests.tiny import RECIPE, ROOT, STOPPED

CPU = torch.device("cpu")


def strict(text):
    """Parse JSON as the standard has it, without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in {text}"))


@pytest.mark.parametrize("option", ["--seed", "--steps", "--guidance"])
def test_an_option_of_sampling_replaces_the_recipes_key_whatever_its_value(monkeypatch, option):
    specification = importlib.util.spec_from_file_location("launch_sample", ROOT / "launch/sample.py")
    sample = importlib.util.module_from_spec(specification)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    specification.loader.exec_module(sample)
    value = "0" if option == "--seed" else "45"
    usual = ["M", "--prompts", "x", "--grid", "a.png", "--steer", "fk", "--steering", "recipes/steer/shapes.yaml"]
    recipe = sample.read_steering(sample.parse([*usual, option, value, "--set", "steps=45"]))
    assert getattr(recipe, option[2:]) == float(value)
    given = argparse.Namespace(**vars(sample.parse([*usual, "--set", "seed=5"])))
    assert sample.read_steering(given).seed == 5
    given.seed = 0
    assert sample.read_steering(given).seed == 5  # --set comes later


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize("option", ["--record", "--processes"])
def test_numbers_below_one_are_refused(refused, option, value):
    more = ["--dry-run"] if option == "--processes" else []
    assert f"{option} must be at least 1, got {value}" in refused("nft", RECIPE, *more, f"{option}={value}")


def test_a_reference_holds_finite_numbers(monkeypatch, tmp_path):
    rows = [{"epoch": 1, "reward/total": math.nan, "train/loss": 1.0}]
    monkeypatch.setattr(reference, "_rerun", lambda *_: rows)
    path = tmp_path / "recipe.yaml"
    with pytest.raises(InputError, match="reward/total must be finite to be a reference"):
        reference.run(None, path, tmp_path, 1)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    content = {"a": [math.nan, (1.5, math.inf)], "b": {"c": -math.inf}, "d": None, "e": "NaN"}
    expected = {"a": [None, [1.5, None]], "b": {"c": None}, "d": None, "e": "NaN"}
    assert strict(json_text(content)) == expected
    write_json(tmp_path / "deep" / "file.json", content)
    assert strict((tmp_path / "deep" / "file.json").read_text()) == expected


def test_metrics_are_null_in_the_file_and_not_a_number_when_they_are_read(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl", 0)
    writer.scalars(1, 1, {"loss": math.nan, "reward": 2.0})
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {"epoch": 1, "step": 1, "loss": None, "reward": 2.0}
    JsonLines(tmp_path / "metrics.jsonl", 2)  # a restart keeps the row
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"]) and row["reward"] == 2.0
    assert strict((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_a_checkpoint_with_metrics_that_are_not_finite_goes_on(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", "epochs=2")
    trainer.pending = {"loss": math.nan, "reward": 1.0}
    state = trainer.state_dict()
    path = checkpoint.save(tmp_path / "checkpoints", 0, trainer.learner.tensors(), state, CheckpointRecipe())
    assert strict((path / "state.json").read_text())["pending"] == {"loss": None, "reward": 1.0}
    trainer.load_state_dict(*checkpoint.load(path))
    assert math.isnan(trainer.pending["loss"]) and trainer.pending["reward"] == 1.0


def test_a_value_model_of_damaged_weights_is_not_written(tmp_path):
    model = StitchedValueModel.from_pretrained("miniature/weights/value/aesthetic")
    model.config = model.config | {"vae": model.config["vae"] | {"scaling": math.nan}}
    with pytest.raises(InputError, match="is not written, it would hold numbers that are not finite"):
        model.save(tmp_path / "value_model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lacking", ["folder", "files", "vocabulary"])
@pytest.mark.parametrize("part", ["tokenizer_2", "tokenizer_3"])
def test_a_model_folder_without_a_tokenizer(tmp_path, part, lacking):
    model = shutil.copytree("miniature/weights/sd3", tmp_path / "model")
    shutil.rmtree(model / part)
    if lacking != "folder":
        (model / part).mkdir()
    if lacking == "vocabulary":
        shutil.copyfile(f"miniature/weights/sd3/{part}/tokenizer_config.json", model / part / "tokenizer_config.json")
    told = f"lacks {part}; a model folder must have" if lacking == "folder" else f"{part} must hold a vocabulary"
    with pytest.raises(InputError, match=told):
        load_text_pipeline(SD3, model, torch.float32, CPU)
    with pytest.raises(InputError, match=told):
        PromptCache(ModelRecipe(str(model), "float32", 64), str(tmp_path / "cache"), CPU)


def test_sampling_refuses_a_model_folder_without_a_tokenizer(refused, tmp_path):
    model = shutil.copytree("miniature/weights/sd3", tmp_path / "model")
    shutil.rmtree(model / "tokenizer_2")
    assert "lacks tokenizer_2" in refused("sample", model, "--prompts", "x", "--grid", tmp_path / "a.png")


def reverse(path: Path) -> None:
    path.write_text("\n".join(reversed(path.read_text().split("\n"))))


@pytest.mark.parametrize("key", ["prompts.train", "prompts.held_out"])
def test_prompts_that_changed_since_the_run_began(train, make_trainer, tmp_path, rows, key):
    prompts = tmp_path / f"{key}.txt"
    prompts.write_text("\n".join((ROOT / "miniature/prompts/held_out.txt").read_text().splitlines()[:4]))
    settings = [f"{key}={prompts}", "evaluation.samples=2", "evaluation.grid=2"]
    train(tmp_path / "run", "epochs=1", *settings)
    before = rows(tmp_path / "run")
    reverse(prompts)
    with pytest.raises(InputError, match=rf"the contents of {key} \(.*{key}.txt\) are not those that this run began"):
        make_trainer(tmp_path / "run", "epochs=2", *settings)
    assert rows(tmp_path / "run") == before
    reverse(prompts)
    assert make_trainer(tmp_path / "run", "epochs=2", *settings, "evaluation.samples=3").epoch == 1


def test_a_value_model_that_changed_since_the_run_began(make_trainer, tmp_path):
    value = shutil.copytree("miniature/weights/value/aesthetic", tmp_path / "value")
    rewards = f"rewards=[{{kind: value, value_model: {value}}}]"
    trainer = make_trainer(tmp_path / "run", *STOPPED[1:], rewards)
    before = trainer.state_dict()["inputs"]
    assert before.keys() == {"prompts.train", "prompts.held_out", "rewards.value"}
    require_unchanged(trainer.recipe, before, input_digests(trainer.recipe, *check_prompts(trainer.recipe)))
    weights = bytearray((value / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (value / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match=r"the contents of rewards.value \(.*/value\) are not those"):
        require_unchanged(trainer.recipe, before, input_digests(trainer.recipe, *check_prompts(trainer.recipe)))
