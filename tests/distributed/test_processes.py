"""The number of processes decides how fast a run is, never what it computes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import WORKER, furthest, start
from tests.tiny import RECIPE, STOPPED

pytestmark = pytest.mark.slow

EPOCHS = 3
CLOSE = 1e-5
# A fifteenth of one step: Adam divides a gradient by its own size, so where that is nearly zero rounding shows.
CLOSE_WEIGHTS = 5e-5
# Nine samples in five micro batches, the last one short, in two optimizer steps.
UNEVEN = ("rollout.groups=3", "rollout.group_size=3", "rollout.micro_batch=2", "train.updates_per_epoch=2")
# 64 images less 8 in steps of 20 and micro batches of 8: the last one short, and three for two processes.
STITCHED = ("finetune.batch=20", "backbone.block=2", "reward.block=1")
STITCH = "recipes/stitch/shapes_aesthetic.yaml"
COMMON = (f"epochs={EPOCHS}", "evaluation.every=1", "evaluation.samples=5", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def launch(overrides, small_stitch, tmp_path_factory):
    """launch(processes, {name: settings}) -> {name: run folder}, all in one start of that many processes.

    One named `stitch` builds a value model.
    """

    def start_runs(processes: int, runs: dict[str, tuple[str, ...]]) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp(f"processes-{processes}")
        plan = []
        for name, settings in runs.items():
            out = folder / name
            if name == "stitch":
                cache = f"data.cache={folder}/cache"
                plan.append({"recipe": STITCH, "overrides": [*small_stitch, f"out={out}", cache, *settings]})
                continue
            given = overrides(out, *COMMON, *settings)
            plan.append({"recipe": RECIPE, "out": str(out), "overrides": given, "fault": None})
        (folder / "plan.json").write_text(json.dumps(plan))
        done = start("ddp", processes, WORKER, folder / "plan.json", timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
        return {name: folder / name for name in runs}

    return start_runs


@pytest.fixture(scope="module")
def one(launch):
    return launch(1, {"uneven": UNEVEN, "stopped": (*UNEVEN, *STOPPED), "stitch": STITCHED})


@pytest.fixture(scope="module")
def two(launch):
    return launch(2, {"uneven": UNEVEN, "stopped": (*UNEVEN, *STOPPED), "stitch": STITCHED})


@pytest.fixture(scope="module")
def three(launch):
    return launch(3, {"uneven": UNEVEN})["uneven"]


def collected(run: Path) -> list[dict[str, torch.Tensor]]:
    """What each process collected in the first epoch."""
    return [load_file(path) for path in sorted(run.glob("epoch-0-rank-*.safetensors"))]


def assert_same_samples(alone: Path, together: Path, processes: int, samples: int) -> None:
    (expected,) = collected(alone)
    parts = collected(together)
    assert len(parts) == processes and len(expected) == 2 * samples
    assert sum(len(part) for part in parts) == len(expected), "a sample was collected twice or by nobody"
    for part in parts:
        for key, tensor in part.items():
            assert torch.equal(tensor, expected[key]), key
    anchors = torch.stack([expected[f"anchor.{n}"] for n in range(samples)])
    assert torch.pdist(anchors.flatten(1)).min() > 0.1, "samples must differ from each other"


def assert_same_training(alone: Path, together: Path, rows, adapters) -> None:
    expected, found = rows(alone), rows(together)
    assert [row["epoch"] for row in found] == list(range(EPOCHS + 1))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        for key in ("train/policy_loss", "train/kl", "train/old_deviation", "reward/total", "held_out/aesthetic"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], abs=CLOSE), (key, ours["epoch"])
    # In the first epoch nothing has been trained yet: every process's rewards are gathered, and exactly.
    first = {key: value for key, value in expected[1].items() if key.startswith("reward/")}
    assert first and first == {key: value for key, value in found[1].items() if key.startswith("reward/")}
    for epoch in range(1, EPOCHS + 1):
        assert furthest(adapters(together, epoch), adapters(alone, epoch)) < CLOSE_WEIGHTS, epoch
    before, after = adapters(alone, 1), adapters(alone, EPOCHS)
    moved = max(float((after[key] - before[key]).abs().max()) for key in after if key.startswith("current/"))
    assert moved > 100 * CLOSE, "training must have moved the weights by far more than the tolerance"


def test_two_processes_collect_the_samples_of_one_where_the_work_does_not_divide(one, two):
    assert_same_samples(one["uneven"], two["uneven"], processes=2, samples=9)


def test_two_processes_equal_one_where_the_work_does_not_divide(one, two, rows, adapters):
    assert_same_training(one["uneven"], two["uneven"], rows, adapters)


def test_three_processes_collect_the_samples_of_one_where_the_work_does_not_divide(one, three):
    assert_same_samples(one["uneven"], three, processes=3, samples=9)


def test_three_processes_equal_one_where_the_work_does_not_divide(one, three, rows, adapters):
    assert_same_training(one["uneven"], three, rows, adapters)


def test_two_processes_equal_one_on_rollouts_that_stop_early(one, two, rows, adapters):
    assert_same_samples(one["stopped"], two["stopped"], processes=2, samples=9)
    assert_same_training(one["stopped"], two["stopped"], rows, adapters)
    for ours, theirs in zip(rows(two["stopped"])[1:], rows(one["stopped"])[1:], strict=True):
        for key in ("audit/value", "audit/reward", "audit/spearman"):
            assert ours[key] == pytest.approx(theirs[key], abs=CLOSE), key


def test_two_processes_build_the_value_model_of_one(one, two, rows):
    ours, theirs = (rows(runs["stitch"]) for runs in (two, one))
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, abs=CLOSE)
    first, last, other = (
        load_file(run / "checkpoints" / f"epoch-{epoch:06d}" / "network.safetensors")
        for run, epoch in ((one["stitch"], 1), (one["stitch"], 2), (two["stitch"], 2))
    )
    assert furthest(last, other) < CLOSE_WEIGHTS
    assert furthest(last, first) > 100 * CLOSE
