"""A run on three or four processes that was stopped continues bit for bit on as many, and closely on another number."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.launching import EVEN, WORKER, furthest, make_runs, samples, start, weights
from tests.tiny import STOPPED

pytestmark = pytest.mark.slow

CLOSE = 1e-5
LAST = 3
# Nine samples in five micro batches, the last one short, two optimizer steps an epoch, audits.
SETTINGS = (
    *EVEN,
    "rollout.groups=3",
    "rollout.group_size=3",
    "rollout.micro_batch=2",
    "train.updates_per_epoch=2",
    *STOPPED,
)


# ZeRO-3 on four processes takes minutes; test_backends.py has it on two.
BACKENDS = ("ddp", "zero2", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("zero1", "zero3")))


@pytest.fixture(scope="module", params=BACKENDS)
def runs(request, overrides, tmp_path_factory) -> Path:
    """Folders PROCESSES/NAME of runs by one backend.

    `straight` goes through; `stopped` ends after each of its epochs and is started again. 4/through is `stopped`, but
    makes its second epoch on three processes.
    """
    folder = tmp_path_factory.mktemp(request.param)

    def run(out: Path, epochs: int) -> tuple[Path, list[str]]:
        return out, overrides(out, *SETTINGS, f"epochs={epochs}")

    three, four = folder / "3", folder / "4"
    make_runs(request.param, 4, [run(four / "straight", LAST), run(four / "stopped", 1)])
    shutil.copytree(four / "stopped", four / "through")
    plan = [run(three / "straight", 2), run(three / "stopped", 1), run(three / "stopped", 2), run(four / "through", 2)]
    make_runs(request.param, 3, plan)
    make_runs(request.param, 4, [run(four / "stopped", 2), run(four / "stopped", LAST), run(four / "through", LAST)])
    return folder


@pytest.mark.parametrize(("processes", "last"), [(3, 2), (4, LAST)])
def test_a_stopped_run_continues_bit_for_bit_on_as_many_processes(runs, digests, rows, processes, last):
    straight, stopped = runs / f"{processes}/straight", runs / f"{processes}/stopped"
    for epoch in range(1, last + 1):
        assert digests(stopped, epoch) == digests(straight, epoch), epoch
    # An epoch that was a run's last one was evaluated as well.
    for ours, theirs in zip(rows(stopped), rows(straight), strict=True):
        assert {key: ours[key] for key in theirs} == theirs
    assert furthest(weights(straight, last), weights(straight, 1)) > 10 * CLOSE


def test_a_run_goes_from_four_processes_to_three_and_back(runs):
    straight, through = runs / "4/straight", runs / "4/through"
    assert furthest(samples(through, 1), samples(runs / "3/stopped", 1)) <= CLOSE
    for epoch in (2, LAST):
        assert furthest(weights(through, epoch), weights(straight, epoch)) <= CLOSE
    assert furthest(weights(straight, LAST), weights(straight, 2)) > 10 * CLOSE


def test_a_value_model_is_finished_bit_for_bit_by_three_processes(small_stitch, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    # Four micro batches a step: no process is without a gradient, so that the order of a sum shows.
    settings = [*small_stitch, "finetune.micro_batch=4", "backbone.block=2", "reward.block=1"]
    settings.append(f"data.cache={tmp_path}/cache")

    def build(out: Path) -> None:
        run = {"recipe": "recipes/stitch/shapes_aesthetic.yaml", "overrides": [*settings, f"out={out}"]}
        (tmp_path / "plan.json").write_text(json.dumps([run]))
        done = start("ddp", 3, WORKER, tmp_path / "plan.json", timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]

    build(straight)
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "epoch-000002")
    shutil.rmtree(resumed / "value_model")
    build(resumed)
    first, last, again = (
        load_file(folder / "checkpoints" / f"epoch-{epoch:06d}" / "network.safetensors")
        for folder, epoch in ((straight, 1), (straight, 2), (resumed, 2))
    )
    assert furthest(last, again) == 0
    assert furthest(last, first) > 10 * CLOSE
