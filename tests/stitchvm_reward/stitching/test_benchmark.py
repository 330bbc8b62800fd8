"""The benchmark of one score: what it counts, and what it refuses. No time is asserted."""

import json

import torch
from torch import nn

from stitchvm_reward.random_models import randomised
from stitchvm_reward.stitching.benchmark import score_costs
from stitchvm_reward.stitching.config import load_stitch_recipe

RECIPE = "recipes/stitch/shapes_clip.yaml"


def test_both_scores_are_timed_and_counted_in_one_run():
    shallow, deep = (
        score_costs(load_stitch_recipe(RECIPE, [f"backbone.block={block}"]), 2, 1, torch.device("cpu"))
        for block in (1, 4)
    )
    assert [row["method"] for row in deep] == ["stitched", "tweedie"]
    assert shallow[0]["gigaflop"] < deep[0]["gigaflop"] < deep[1]["gigaflop"] == shallow[1]["gigaflop"]
    assert all(row["milliseconds"] > 0 and row["peak_mib"] is None for row in deep)


def test_weights_are_drawn_and_positions_kept():
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(8, 8))
        network.register_buffer("positions", torch.zeros(1, 5, dtype=torch.long))
    made = randomised(network, torch.bfloat16, torch.device("cpu"))
    assert made[0].weight.dtype == torch.bfloat16 and made[0].weight.float().std() > 0
    assert made.positions.tolist() == [[0, 1, 2, 3, 4]]


def test_the_command_writes_what_it_printed_and_refuses_in_one_line(launched, tmp_path):
    code, out, error = launched(
        "benchmark", RECIPE, "--batch", 1, "--repeats", 1, "--out", tmp_path / "deeper" / "found.json"
    )
    assert code == 0, error
    assert "x cheaper in time" in out
    found = json.loads((tmp_path / "deeper" / "found.json").read_text())
    assert found["resolution"] == 64 and [row["method"] for row in found["scores"]] == ["stitched", "tweedie"]
    (tmp_path / "file").write_text("kept")
    for arguments, told in (
        (("--batch", 0), "--batch must be at least 1"),
        (("backbone.block=9",), "at most 6"),
        (("backbone.block=9", "--out", tmp_path / "file" / "found.json"), "cannot write"),
    ):
        code, _, error = launched("benchmark", RECIPE, *arguments)
        assert code == 2 and told in error and len(error.splitlines()) == 1, error
