"""What the scaling command counts, estimates and tells. No time is asserted."""

import json
from dataclasses import replace

import pytest

from nft.config import Recipe, load_recipe
from nft.cost import scaling
from nft.cost.communication import (
    Cluster,
    Message,
    bytes_per_epoch,
    bytes_per_evaluation,
    estimate,
    grown,
)
from nft.cost.plan import Costs
from stitchvm_reward.errors import InputError

EIGHT = "recipes/aesthetic_8gpu.yaml"
PARAMETERS = 18_776_064
# One forward takes a second on one GPU, and training a sample two.
CLUSTER = Cluster(peak=2e12, reached=0.5, latency=1e-3)
COSTS = Costs(
    base_parameters=1,
    adapted_layers=1,
    adapter_parameters=PARAMETERS,
    forward_flops=1e12,
    training_flops=2e12,
    decode_flops=0.5e12,
    score_flops=0.5e12,
    pixel_score_flops=0.0,
    score_unknown=[],
)


def full(**rollout) -> Recipe:
    """Rollouts of ten steps to the image, trained on one level without reference: 13 seconds a sample."""
    recipe = load_recipe("recipes/shapes/aesthetic.yaml")
    return replace(recipe, rollout=replace(recipe.rollout, **rollout))


def test_the_bytes_of_the_published_geometry():
    found = {m.what: (m.times, m.size) for m in bytes_per_epoch(load_recipe(EIGHT), PARAMETERS, 8)}
    assert found == {
        "gradients": (1, 75_104_256),
        "loss sums": (1, 16),
        "rewards": (2, 8 * 1152),
        "groups and tau": (2, 8 * 1152),
        "meetings of the rollout": (1 + 18, 24),
        "meetings of the training": (18, 24),
        "audit: values and rewards": (0.2, 8 * 1152),
        "audit: meeting": (0.1, 24),
    }
    evaluation = {m.what: (m.times, m.size) for m in bytes_per_evaluation(load_recipe(EIGHT), 8)}
    assert evaluation == {
        "evaluation: measures": (2, 8 * 128),
        "evaluation: picture grid": (1, 16 * 3 * 512 * 512),
        "evaluation: meetings": (1 + 2, 24),
    }


def test_every_update_reduces_the_gradients_again():
    recipe = load_recipe("recipes/shapes/aesthetic.yaml", ["train.updates_per_epoch=2"])
    found = {m.what: m.times for m in bytes_per_epoch(recipe, 10, 2)}
    assert found["gradients"] == found["loss sums"] == 2 and "audit: meeting" not in found


def test_one_process_says_nothing():
    recipe = full()
    assert bytes_per_epoch(recipe, 10, 1) == bytes_per_evaluation(recipe, 1) == []
    assert estimate(recipe, COSTS, 1, CLUSTER)["efficiency"] == 1


def test_a_reductions_bytes_go_round_twice():
    reduced = Message("a", 3, 800)
    assert reduced.sent(8) == 3 * 800 * 2 * 7 / 8
    cluster = Cluster(inside=1e3, between=1e2, latency=0.5)
    assert cluster.seconds(reduced, 8) == pytest.approx(4.2 + 3 * 6 * 0.5)
    assert cluster.seconds(reduced, 16) == pytest.approx(45 + 3 * 8 * 0.5)
    assert cluster.seconds(reduced, 1) == 0


def test_an_epoch_that_divides_loses_only_what_is_said():
    found = estimate(full(groups=16, group_size=8, micro_batch=8), COSTS, 8, CLUSTER)
    assert found["seconds_even"] == pytest.approx(16 * 13) and found["most_micro_batches"] == 2
    assert found["seconds_undivided"] == pytest.approx(0) and found["seconds_stops"] == 0
    parts = sum(value for name, value in found.items() if name.startswith("seconds_"))
    assert found["images_per_second"] == pytest.approx(128 / parts)
    assert found["efficiency"] == pytest.approx(found["seconds_even"] / parts)


def test_processes_wait_where_micro_batches_do_not_divide():
    found = estimate(full(groups=16, group_size=8, micro_batch=8), COSTS, 12, CLUSTER)
    assert found["seconds_even"] + found["seconds_undivided"] == pytest.approx(16 * 13)
    idle = estimate(full(groups=16, group_size=8, micro_batch=8), COSTS, 64, CLUSTER)
    assert idle["seconds_even"] == pytest.approx(26) and idle["seconds_undivided"] == pytest.approx(104 - 26)
    # The last micro batch has one sample of nine, and the processes wait for the others.
    short = estimate(full(groups=3, group_size=3, micro_batch=8), COSTS, 2, CLUSTER)
    assert short["seconds_even"] + short["seconds_undivided"] == pytest.approx(8 * 13)


def test_processes_wait_for_the_rollout_that_stops_last():
    # Never fewer than five steps, of which a sample's even part is six.
    recipe = replace(load_recipe(EIGHT), seed=1)
    recipe = replace(recipe, rollout=replace(recipe.rollout, stop_window=[5, 7]))
    even = estimate(recipe, COSTS, 1, CLUSTER)
    several = estimate(recipe, COSTS, 8, CLUSTER)
    assert even["seconds_stops"] == pytest.approx(0) and several["seconds_undivided"] == pytest.approx(0)
    assert several["seconds_even"] == pytest.approx(even["seconds_even"] / 8)
    # All would wait for the seventh step in nearly each of 18 rounds, were they not dealt in the order of their stops.
    assert 0 < several["seconds_stops"] < 0.1 * 144


def test_an_epoch_that_grows_keeps_each_gpus_work():
    recipe = full(groups=16, group_size=8, micro_batch=8)
    more = grown(recipe, 64, 8)
    assert more.rollout.groups == 128 and recipe.rollout.groups == 16
    found = estimate(more, COSTS, 64, CLUSTER)
    assert found["most_micro_batches"] == 2 and found["seconds_undivided"] == pytest.approx(0)


def test_a_row_takes_the_slowest_process_of_each_epoch():
    recipe = full(groups=16, group_size=8, micro_batch=8)
    first = {"seconds": [2.0, 4.0, 9.0], "meet": [0.0, 1.0, 0.0], "cpu": [2.0, 1.0, 9.0]}
    second = {"seconds": [3.0, 3.0, 8.0], "meet": [1.0, 1.0, 0.0], "cpu": [1.5, 3.0, 4.0]}
    alone = {"gradient": 0.25, "meeting": 0.01, "adapter_parameters": 10}
    row = scaling.row_of([first | alone, second | alone], recipe)
    assert row["epoch_seconds"] == 4 and row["images_per_second"] == 32
    assert row["images_per_second_per_process"] == 16 and row["gradient_share"] == 0.25 / 4
    assert row["meet_share"] == pytest.approx(0.5 / 3) and row["cpu_share"] == 0.75
    # Nine meetings of the rollout and eight of the training.
    assert row["meetings_share"] == pytest.approx(17 * 0.01 / 4)
    assert row["bytes_per_epoch"] == 40 + 16 + 4 * 8 * 128 + 17 * 24


def test_the_command_measures_and_writes_what_it_printed(overrides, tmp_path, monkeypatch, capsys):
    """The worker in this process: another one would only be started."""
    monkeypatch.setattr(scaling, "start", lambda processes, plan: scaling.work(plan))
    given = [argument for argument in overrides(tmp_path / "run") if not argument.startswith("out=")]
    out = tmp_path / "found.json"
    command = ["recipes/shapes/aesthetic.yaml", *given, "--processes", "1", "--epochs", "1", "--out", str(out)]
    scaling.run(scaling.parse(command))
    told, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "images/s" in told and found["commit"] in told
    (row,) = found["rows"]
    assert {"device", "threads", "torch", "commit", "recipe", "overrides"} <= found.keys()
    assert row["processes"] == 1 and len(row["epochs"]) == 1 and row["images_per_second"] > 0
    assert row["bytes_per_epoch"] == row["gradient_share"] == row["meet_share"] == 0
    assert not (tmp_path / "run").exists()


def test_the_command_estimates_without_weights(tmp_path, capsys):
    out = tmp_path / "found.json"
    scaling.run(scaling.parse(["recipes/shapes/stopped.yaml", "--estimate", "--out", str(out)]))
    told, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "assumed, not measured" in told and "meetings of the rollout" in told and "grown" in told
    assert [(row["epoch"], row["processes"]) for row in found["estimates"]] == [
        *(("fixed", n) for n in (8, 64, 1024)),
        *(("grown", n) for n in (64, 1024)),
    ]


def test_what_cannot_be_measured_is_refused():
    for more, told in ((["--processes", "0"], "from 1 to"), (["--processes", "4096"], "from 1 to")):
        with pytest.raises(InputError, match=told):
            scaling.run(scaling.parse(["recipes/shapes/aesthetic.yaml", *more]))
    with pytest.raises(InputError, match="--epochs must be at least 1"):
        scaling.run(scaling.parse(["recipes/shapes/aesthetic.yaml", "--epochs", "0"]))
