"""Rewards of base and tuned pictures, paired."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

from nft.evaluation.measure import compare, evaluate_images, table
from nft.export.card import Texts
from nft.export.files import export
from nft.export.lora import LORA_NAME
from nft.export.trained import read_trained
from stitchvm_reward.bootstrap import mean_interval
from stitchvm_reward.errors import InputError

MEASURES = ["aesthetic", "total", "checker", "checker_share", "true_aesthetic", "colourfulness"]


@pytest.fixture(scope="module")
def lora(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "comfyui"
    export(read_trained(trained_run[1]), "comfyui", None, folder, Texts())
    return folder / LORA_NAME


@pytest.fixture(scope="module")
def idle(lora, tmp_path_factory):
    """A file for the same layers that changes nothing."""
    path = tmp_path_factory.mktemp("idle") / "idle.safetensors"
    save_file({key: t * 0 if "lora_B" in key else t for key, t in load_file(lora).items()}, path)
    return path


@pytest.fixture(scope="module")
def recipe(trained_run):
    return trained_run[0].recipe


def test_base_and_tuned_means_are_those_of_the_runs_own_evaluation(recipe, lora, trained_run, rows):
    found = evaluate_images(recipe, lora, None, None, torch.device("cpu"))
    first, last = rows(trained_run[1])[0], rows(trained_run[1])[-1]
    assert [row["measure"] for row in found] == MEASURES
    for row in found:
        assert row["base"] == pytest.approx(first[f"held_out/{row['measure']}"], abs=1e-4)
        assert row["tuned"] == pytest.approx(last[f"held_out/{row['measure']}"], abs=1e-4)
    assert abs(found[0]["difference"]) > 0.01


def test_a_lora_that_changes_nothing_makes_no_difference(recipe, idle):
    for row in evaluate_images(recipe, idle, 3, 7, torch.device("cpu")):
        assert row["difference"] == 0 and tuple(row["difference_interval"]) == (0, 0)
        assert row["improved"] == row["worse"] == 0


def test_the_noise_is_the_seeds(recipe):
    first, again, other = (
        evaluate_images(recipe, None, 2, seed, torch.device("cpu"))[0]["base"] for seed in (None, recipe.seed, 8)
    )
    assert first == again != other


def test_the_interval_is_the_bootstraps_and_paired():
    generator = np.random.default_rng(0)
    base = generator.normal(5, 1, 60)
    tuned = base + generator.normal(0.4, 0.2, 60)
    row = compare("score", base, tuned)
    paired, alone = mean_interval((tuned - base)[None]), mean_interval(base[None])
    assert (row["difference"], row["difference_interval"]) == (pytest.approx(paired.mean), (paired.low, paired.high))
    assert row["base_interval"] == (alone.low, alone.high)
    # With 60 prompts the interval over prompts is close to that of Student's t.
    expected = stats.ttest_rel(tuned, base).confidence_interval(0.95)
    assert row["difference_interval"] == pytest.approx((expected.low, expected.high), abs=0.01)
    assert row["improved"] == (tuned > base).mean() and row["improved"] + row["worse"] == 1


def test_the_command_prints_a_table_and_writes_the_same_as_json(trained_run, lora, launched, tmp_path):
    code, out, error = launched(
        *("evaluate", "images", trained_run[1] / "recipe.yaml", "--trust-code", "--lora", lora, "--count", 3),
        *("--out", tmp_path / "deeper" / "found.json", "evaluation.steps=1"),
    )
    assert code == 0, error
    found = json.loads((tmp_path / "deeper" / "found.json").read_text())
    assert found["prompts"] == 3 and found["seed"] == 0 and found["confidence"] == 0.95
    assert {"device", "commit", "torch", "diffusers"} <= found.keys()
    assert found["overrides"] == ["evaluation.steps=1"] and found["lora"] == str(lora)
    assert out.strip() == table(found["rows"])
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["measure", "base", "tuned", "difference"] and len(lines) == 1 + len(MEASURES)
    assert "%" in lines[1] and "[" in lines[1]


def test_without_a_lora_the_table_is_of_the_base(trained_run, launched):
    code, out, _ = launched(
        "evaluate", "images", trained_run[1] / "recipe.yaml", "--trust-code", "evaluation.steps=1", "--count", 2
    )
    assert code == 0 and "tuned" not in out and out.splitlines()[1].split()[0] == "aesthetic"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--lora", "nowhere.safetensors"), "LoRA file not found"),
        (("--count", 1), "--count must be at least 2"),
        (("--count", 100_000), "100000 were requested"),
        (("--seed", -1), "--seed must be 0 or more"),
        (("--out", "setup.cfg/found.json"), "cannot write setup.cfg/found.json"),
        (("evaluation.stps=1",), "unknown recipe key evaluation.stps"),
        (("model.path=./nowhere",), "model folder not found"),
        (("evaluation.metrics=[miniature.measures:nothing]",), "miniature.measures:nothing"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, told, trained_run, launched, tmp_path):
    out_file = ("--out", tmp_path / "found.json")
    code, out, error = launched(
        "evaluate", "images", trained_run[1] / "recipe.yaml", "--trust-code", *out_file, *arguments
    )
    assert code == 2 and out == "" and len(error.splitlines()) == 1 and told in error, error
    assert not list(tmp_path.iterdir())


def test_a_lora_of_another_model_is_refused(recipe, lora, tmp_path):
    tensors = {key: t.repeat(1, 2) if "lora_A" in key else t for key, t in load_file(lora).items()}
    save_file(tensors, tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match="does not fit this model"):
        evaluate_images(recipe, tmp_path / "wide.safetensors", 2, None, torch.device("cpu"))


def test_an_option_that_is_unknown_ends_the_command(launched):
    with pytest.raises(SystemExit):
        launched("evaluate", "images", "recipe.yaml", "--nonsense")
