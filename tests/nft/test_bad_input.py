"""A user's mistake ends with one line on stderr and exit code 2, before anything is written."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nft import preflight
from nft.config import load_recipe
from stitchvm_reward.families import SD3
from stitchvm_reward.prompts import read_prompts
from stitchvm_reward.runs.recipe import dump

ROOT = Path(__file__).parents[2]
PARTS = ("transformer", "vae", "scheduler", *SD3.text_parts)


@pytest.fixture
def recipe(tmp_path):
    """A recipe without a fault, as a file in a folder of its own with all that it names."""
    model = ROOT / "miniature/weights/sd3"
    for file in (model / "model_index.json", *model.glob("*/*config.json")):  # configurations without weights
        copy = tmp_path / "model" / file.relative_to(model)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.txt").write_text("a red circle on white\na blue square on black\n")
    content = {
        "out": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model"), "resolution": 64},
        "prompts": {
            "train": str(tmp_path / "train.txt"),
            "held_out": str(tmp_path / "held_out.txt"),
            "cache": str(tmp_path / "cache"),
        },
        "rewards": [{"kind": "function", "function": "miniature.measures:true_aesthetic"}],
        "evaluation": {"samples": 2, "grid": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def check_refusal(code, stdout, stderr, *message):
    assert code == 2 and stdout == ""
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert all(part in lines[0] for part in message), stderr


@pytest.fixture
def refuses(monkeypatch, capfd, recipe):
    """Run the command line in this process and check that it refuses, having written nothing."""

    def run(*overrides, message):
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", ["launch/nft.py", str(recipe), *overrides, "--trust-code"])
        specification = importlib.util.spec_from_file_location("launch_nft", ROOT / "launch" / "nft.py")
        command = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(command)
        before = tree(recipe.parent)
        capfd.readouterr()
        check_refusal(command.main(), *capfd.readouterr(), *message)
        assert tree(recipe.parent) == before

    return run


def test_the_recipe_used_here_has_no_fault(recipe):
    before = tree(recipe.parent)
    preflight.check_recipe(load_recipe(recipe))
    assert tree(recipe.parent) == before


def test_missing_model_folder(refuses, tmp_path):
    refuses(f"model.path={tmp_path}/nowhere", message=["model folder not found", "nowhere"])


def test_training_in_float16(refuses):
    refuses("model.dtype=float16", message=["bfloat16 or float32", "gradients are too small", "'float16'"])


def test_missing_model_folder_that_looks_like_a_hub_id(refuses):
    refuses("model.path=models/nowhere", message=["models/nowhere"])


@pytest.mark.parametrize("part", PARTS)
def test_model_folder_that_lacks_a_part(refuses, tmp_path, part):
    shutil.rmtree(tmp_path / "model" / part)
    refuses(message=[f"lacks {part}"])


def test_missing_reward_model_and_head(refuses, tmp_path):
    rewards = "rewards=[{kind: aesthetic, model: %s, head: %s}]"
    refuses(rewards % (tmp_path / "clip", tmp_path / "head.pth"), message=["model folder not found"])
    (tmp_path / "clip").mkdir()
    refuses(rewards % (tmp_path / "clip", tmp_path / "head.pth"), message=["lacks config.json"])
    (tmp_path / "clip" / "config.json").write_text("{}")
    refuses(rewards % (tmp_path / "clip", tmp_path / "head.pth"), message=["aesthetic head not found", "head.pth"])


@pytest.mark.parametrize("kind", ["clip", "dfn_clip", "hpsv2", "pickscore"])
def test_reward_model_that_is_a_file_of_weights(refuses, tmp_path, kind):
    (tmp_path / "hps.pt").write_bytes(b"")
    for model in (tmp_path / "hps.pt", "weights/hps.pt"):
        command = f"python -m stitchvm_reward.rewards.open_clip {model} OUT --tokenizer"
        refuses(f"rewards=[{{kind: {kind}, model: {model}}}]", message=[command])


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_missing_prompt_file(refuses, tmp_path, name):
    (tmp_path / f"{name}.txt").unlink()
    refuses(message=["prompt file not found", f"{name}.txt"])


@pytest.mark.parametrize("content", ["", "\n  \n\t\n"])
def test_empty_prompt_file(refuses, tmp_path, content):
    (tmp_path / "train.txt").write_text(content)
    refuses(message=["train.txt holds no prompts"])


def test_prompt_file_that_is_not_utf8(refuses, tmp_path):
    (tmp_path / "train.txt").write_bytes("un café".encode("latin-1"))
    refuses(message=["train.txt is not UTF-8", "byte 6"])


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    (tmp_path / "train.txt").write_text("a red circle\n", encoding="utf-8-sig")
    assert read_prompts(str(tmp_path / "train.txt"), "text", "train") == ["a red circle"]


def test_prompt_file_of_an_unknown_kind(refuses, tmp_path):
    (tmp_path / "train.docx").write_text("a red circle")
    refuses(f"prompts.train={tmp_path}/train.docx", message=["train.docx", ".txt, .json"])


def test_prompt_file_without_the_column(refuses, tmp_path):
    (tmp_path / "train.csv").write_text("number,texts\n1,a red circle\n")
    refuses(f"prompts.train={tmp_path}/train.csv", message=["train.csv has no column 'text'", "did you mean 'texts'?"])


def test_prompt_column_of_blanks(refuses, tmp_path):
    (tmp_path / "train.csv").write_text("number,text\n1,\n2,\n")
    refuses(f"prompts.train={tmp_path}/train.csv", message=["train.csv holds no prompts"])


def test_fewer_prompts_than_evaluation_samples(refuses):
    refuses("evaluation.samples=3", message=["evaluation.samples is 3", "holds 2 prompts"])


@pytest.mark.parametrize("function", ["miniature.measures:nothing", "no_such_module:score", "miniature.scenes:SIZE"])
def test_missing_reward_function(refuses, function):
    refuses(f"rewards=[{{kind: function, function: '{function}'}}]", message=[function])


def test_missing_metric_function(refuses):
    refuses("evaluation.metrics=[miniature.measures:nothing]", message=["miniature.measures:nothing"])


def test_run_folder_of_a_different_recipe_is_left_as_it_is(refuses, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump(load_recipe(recipe)))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"epoch": 0}\n')
    refuses("train.beta=.5", message=["different recipe", "train.beta is 1.0 there and 0.5 here"])


def test_run_folder_is_not_begun_anew(refuses, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump(load_recipe(recipe)))
    refuses("checkpoint.resume=never", message=["already holds a run"])


@pytest.mark.parametrize("content", [b"", b"epochs: [", b"\xff\xfe", b"- a\n"], ids=["empty", "cut", "binary", "list"])
def test_run_folder_with_a_damaged_recipe(refuses, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_bytes(content)
    refuses(message=["recipe.yaml is damaged: it is not known which run ", "move it away"])


def test_a_longer_run_goes_on_in_its_folder(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump(load_recipe(recipe)))
    preflight.check_recipe(load_recipe(recipe, ["epochs=500", "evaluation.steps=7", "checkpoint.keep=1"]))


@pytest.mark.parametrize("out", ["file", "file/run", "file/deeper/run"])
def test_run_folder_that_cannot_be_written(refuses, tmp_path, out):
    (tmp_path / "file").write_text("kept")
    refuses(f"out={tmp_path / out}", message=["cannot write the run folder", out])


def as_subprocess(recipe, *overrides, message):
    before = tree(recipe.parent)
    command = [sys.executable, str(ROOT / "launch" / "nft.py"), str(recipe), *overrides]
    done = subprocess.run(command, cwd=recipe.parent, capture_output=True, text=True)
    check_refusal(done.returncode, done.stdout, done.stderr, *message)
    assert tree(recipe.parent) == before


def test_misspelt_override(refuses):
    refuses("rollout.grops=3", message=["unknown recipe key rollout.grops", "'groups'"])


@pytest.mark.slow
def test_malformed_prompt_file_as_a_command(recipe, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a red circle"}\n{"text": \n')
    as_subprocess(recipe, f"prompts.train={tmp_path}/train.jsonl", message=["train.jsonl cannot be read as json"])
