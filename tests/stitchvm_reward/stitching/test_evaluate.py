"""The quality table of a value model, and what it refuses."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from stitchvm_reward.stitching.evaluate import recall


@pytest.fixture(scope="module")
def latent_folder(stitch, tmp_path_factory):
    return stitch("aesthetic", tmp_path_factory.mktemp("stitch") / "latent-seed0", "backbone.block=0", "reward.block=1")


@pytest.fixture(scope="module")
def other_seed(latent_folder, tmp_path_factory):
    """The same model under the name of a second run."""
    folder = tmp_path_factory.mktemp("stitch") / "latent-seed1" / "value_model"
    return shutil.copytree(latent_folder, folder)


def evaluate(*arguments):
    return subprocess.run(
        [sys.executable, "launch/evaluate.py", "value", *map(str, arguments)], capture_output=True, text=True
    )


def test_the_table_holds_every_method_level_and_measure(
    aesthetic_folder, latent_folder, other_seed, image_folder, tmp_path
):
    done = evaluate(
        *(aesthetic_folder, latent_folder, other_seed),
        *("--images", image_folder),
        *("--count", 12, "--sigmas", 0.25, 0.75, "--rollouts", 1, "--truth-latents", 2, "--truth-rollouts", 2),
        *("--truth", "miniature.measures:true_aesthetic", "--out", tmp_path / "found.json"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    methods = {"aesthetic", "latent-seed0", "latent-seed1", "tweedie", "monte carlo"}
    assert {(row["method"], row["sigma"]) for row in found["quality"]} == {("clean", None)} | {
        (method, sigma) for method in methods for sigma in (0.25, 0.75)
    }
    assert found["quality"][0]["spearman_clean"] == pytest.approx(1)
    assert all(-1 <= row["spearman_true"] <= 1 for row in found["quality"])
    assert {row["method"] for row in found["errors"]} == methods
    costs = {row["method"]: row["gigaflop"] for row in found["costs"]}
    assert costs["latent-seed0"] < costs["aesthetic"] < costs["tweedie"] < costs["monte carlo"]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("aesthetic", "latent", "tweedie", "monte")] == [
        "aesthetic",
        "latent",
        "tweedie",
        "monte",
    ] * 4
    assert "±0.000" in done.stdout and (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"


def test_a_model_that_reads_text_is_also_judged_by_retrieval(clip_folder, image_folder, tmp_path):
    arguments = ("--images", image_folder, "--count", 8, "--sigmas", 0.5, "--rollouts", 0, "--truth-latents", 0)
    done = evaluate(clip_folder, *arguments, "--out", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["quality"]
    assert [row["method"] for row in rows] == ["clean", "clip", "tweedie"]
    assert all(0 <= row[key] <= 1 for row in rows for key in ("recall_text", "recall_image"))


def test_recall_counts_nearest_neighbours_both_ways():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert recall(images, texts) == pytest.approx((2 / 3, 2 / 3))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--sigmas", "1.0"), "--sigmas must lie between 0 and 1, got 1.0"),
        (("--count", "1"), "--count must be at least 2, got 1"),
        (("--count", "5000"), "5000 were asked for"),
        (("--truth", "miniature.measures:nothing"), "cannot import miniature.measures:nothing"),
        (("--truth-latents", "-1"), "--truth-latents must be 0 or more, got -1"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(aesthetic_folder, image_folder, arguments, told):
    done = evaluate(aesthetic_folder, "--images", image_folder, *arguments)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_models_that_cannot_stand_in_one_table_are_refused(aesthetic_folder, clip_folder, image_folder):
    for others, told in (
        (["/nowhere"], "value model not found: /nowhere"),
        ([clip_folder], "have not the same reward"),
        ([aesthetic_folder], "needs a name of its own"),
    ):
        done = evaluate(aesthetic_folder, *others, "--images", image_folder)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
