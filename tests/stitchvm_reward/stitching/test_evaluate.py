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


@pytest.mark.slow
def test_the_table_holds_every_method_level_and_measure(
    launched, aesthetic_folder, latent_folder, other_seed, image_folder, tmp_path
):
    code, out, error = launched(
        *("evaluate", "value", aesthetic_folder, latent_folder, other_seed),
        *("--images", image_folder),
        *("--count", 12, "--sigmas", 0.25, 0.75, "--rollouts", 1, "--truth-latents", 2, "--truth-rollouts", 2),
        *("--truth", "miniature.measures:true_aesthetic", "--out", tmp_path / "found.json"),
    )
    assert code == 0, error
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"device", "commit", "torch", "diffusers"} <= found.keys()
    methods = {"aesthetic", "latent-seed0", "latent-seed1", "tweedie", "monte carlo"}
    assert {(row["method"], row["sigma"]) for row in found["quality"]} == {("clean", None)} | {
        (method, sigma) for method in methods for sigma in (0.25, 0.75)
    }
    assert found["quality"][0]["spearman_clean"] == pytest.approx(1)
    assert all(-1 <= row["spearman_true"] <= 1 for row in found["quality"])
    assert {row["method"] for row in found["errors"]} == methods
    costs = {row["method"]: row["gigaflop"] for row in found["costs"]}
    assert costs["latent-seed0"] < costs["aesthetic"] < costs["tweedie"] < costs["monte carlo"]
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("aesthetic", "latent", "tweedie", "monte")] == [
        "aesthetic",
        "latent",
        "tweedie",
        "monte",
    ] * 4
    assert "±0.000" in out and (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_model_that_reads_text_is_also_judged_by_retrieval(launched, clip_folder, image_folder, tmp_path):
    arguments = ("--images", image_folder, "--count", 8, "--sigmas", 0.5, "--rollouts", 0, "--truth-latents", 0)
    code, _, error = launched("evaluate", "value", clip_folder, *arguments, "--out", tmp_path / "found.json")
    assert code == 0, error
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
        (("--count", "5000"), "5000 were requested"),
        (("--truth", "miniature.measures:nothing"), "cannot import miniature.measures:nothing"),
        (("--truth-latents", "-1"), "--truth-latents must be 0 or more, got -1"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(launched, aesthetic_folder, image_folder, arguments, told):
    code, out, error = launched("evaluate", "value", aesthetic_folder, "--images", image_folder, *arguments)
    assert code == 2 and out == "" and told in error and len(error.splitlines()) == 1, error


@pytest.mark.slow
def test_a_process_of_its_own_tells_no_more_than_that_line(aesthetic_folder, image_folder):
    command = [sys.executable, "launch/evaluate.py", "value", aesthetic_folder, "--images", image_folder]
    done = subprocess.run([*command, "--truth", "miniature.measures:nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and "cannot import miniature.measures:nothing" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_an_out_that_cannot_be_written_is_told_before_anything_is_measured(launched, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "found.png").mkdir()
    for out in ("file/found.json", "found.json"):
        code, _, error = launched("evaluate", "value", "/nowhere", "--images", "/nowhere", "--out", tmp_path / out)
        assert code == 2 and "cannot write" in error and len(error.splitlines()) == 1, error
    assert {path.name for path in tmp_path.iterdir()} == {"file", "found.png"}


def test_models_that_cannot_stand_in_one_table_are_refused(launched, aesthetic_folder, clip_folder, image_folder):
    for others, told in (
        (["/nowhere"], "value model not found: /nowhere"),
        ([clip_folder], "do not have the same reward"),
        ([aesthetic_folder], "needs a unique name"),
    ):
        code, _, error = launched("evaluate", "value", aesthetic_folder, *others, "--images", image_folder)
        assert code == 2 and told in error and len(error.splitlines()) == 1, error
