"""Comparing runs by what a held-out measure cost them."""

import json

import pytest

from nft.evaluation.compare import draw, reached, read_curve, table
from stitchvm_reward.errors import InputError


def write(folder, values, seconds, teraflop=2.0):
    folder.mkdir()
    rows = [{"epoch": 0, "held_out/total": values[0], "held_out/truth": values[0], "seconds/evaluate": 100.0}]
    for epoch, value in enumerate(values[1:], start=1):
        cost = {"seconds/rollout": seconds / 2, "seconds/train": seconds / 2, "cost/teraflop": teraflop}
        rows.append({"epoch": epoch, **cost})
        if value is not None:
            rows[-1] |= {"held_out/total": value, "held_out/truth": value, "held_out/truth_std": 9.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_target_is_reached_in_proportion_between_two_evaluations(tmp_path):
    curve = read_curve(write(tmp_path / "run", [1.0, None, 2.0, None, 4.0], seconds=10.0))
    whole = {"seconds": [0.0, 20.0, 40.0], "teraflop": [0.0, 4.0, 8.0], "epoch": [0, 2, 4]}
    assert curve.axes == whole | {
        "rollout": [0.0, 10.0, 20.0],
        "train": [0.0, 10.0, 20.0],
        "decode": [0.0] * 3,
        "score": [0.0] * 3,
        "audit": [0.0] * 3,
        "meet": [0.0] * 3,
    }
    assert set(curve.measures) == {"total", "truth"}
    found = reached(curve, "truth", 3.0)
    assert found.cost["seconds"] == 30.0 and found.cost["teraflop"] == 6.0 and found.cost["epoch"] == 3.0
    assert found.cost["rollout"] == 15.0
    assert found.measures["truth"] == pytest.approx(3.0)
    assert reached(curve, "truth", 5.0) is None
    assert reached(curve, "truth", 0.5).cost["seconds"] == 0


def test_arms_are_compared_with_the_first(tmp_path):
    folders = [
        write(tmp_path / "full-seed0", [0.0, 1.0, 2.0], seconds=10.0),
        write(tmp_path / "full-seed1", [0.0, 2.0], seconds=10.0),
        write(tmp_path / "stopped-seed0", [0.0, 2.0], seconds=5.0),
        write(tmp_path / "stopped-seed1", [0.0, 0.5], seconds=5.0),
    ]
    curves = [read_curve(folder) for folder in folders]
    text = "\n".join(table(curves, "truth", 2.0))
    assert "1.00x less seconds" in text and "3.00x less seconds" in text and "1.50x less TFLOP" in text
    assert "rollout 2.5 s  train 2.5 s" in text
    assert "1 never reached it" in text and "best 0.5" in text
    draw(curves, ["truth"], 2.0, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_without_evaluations_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no evaluated run"):
        read_curve(tmp_path)


def test_an_arm_that_begins_above_the_target_has_spent_nothing(tmp_path):
    runs = [write(tmp_path / name, values, 10.0) for name, values in (("slow", [1.0, None, 3.0]), ("above", [5.0]))]
    assert any("- less" in line for line in table([read_curve(run) for run in runs], "truth", 2.0))
