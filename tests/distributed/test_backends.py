"""DDP and every stage of ZeRO compute what one process does, and a run moves between them and between numbers of
processes as if nothing had been."""

import shutil
from pathlib import Path

import pytest

from tests.distributed.launching import EVEN, furthest, loss_apart, run_all, same_weights, samples, weights
from tests.tiny import STOPPED

pytestmark = pytest.mark.slow

CLOSE = 1e-5
# ZeRO-1 sums gradients as ZeRO-2 does and shards the same moments.
BACKENDS = ("ddp", pytest.param("zero1", marks=pytest.mark.exhaustive), "zero2", "zero3")
# Nine samples in three micro batches, two optimizer steps an epoch, groups that stop at different steps, audits.
UNEVEN = (
    "rollout.groups=3",
    "rollout.group_size=3",
    "rollout.micro_batch=4",
    "train.updates_per_epoch=2",
    "train.learning_rate=1e-4",
    *STOPPED,
    "evaluation.samples=3",
    "evaluation.grid=1",
    "evaluation.steps=1",
    "checkpoint.keep=9",
)
LAST = 3


@pytest.fixture(scope="module")
def one(overrides, tmp_path_factory) -> Path:
    """The folder of a run on one process."""
    even = tmp_path_factory.mktemp("one") / "even"
    run_all("ddp", 1, {even: overrides(even, *EVEN)})
    return even


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def runs(backend, overrides, tmp_path_factory) -> Path:
    """Folders NAME of runs on two processes.

    `even` and `straight` go through. `stopped` ends after an epoch and goes on from there; `through` likewise, but
    makes its second epoch on one process, of ZeRO-1 and -2 without DeepSpeed.
    """
    place = tmp_path_factory.mktemp(backend)
    even, straight, stopped, through = (place / name for name in ("even", "straight", "stopped", "through"))

    def uneven(out: Path, epochs: int) -> list[str]:
        return overrides(out, *UNEVEN, f"epochs={epochs}")

    first = {even: overrides(even, *EVEN), straight: uneven(straight, LAST), stopped: uneven(stopped, 1)}
    if backend == "ddp":
        first[place / "unreduced"] = overrides(place / "unreduced", *EVEN)
    run_all(backend, 2, first)
    shutil.copytree(stopped, through)
    run_all("zero3" if backend == "zero3" else "ddp", 1, {through: uneven(through, 2)})
    run_all(backend, 2, {out: uneven(out, LAST) for out in (stopped, through)})
    return place


def test_two_processes_compute_what_one_does(backend, one, runs):
    two = runs / "even"
    # A linear layer adds its bias apart under ZeRO-3.
    assert furthest(samples(two, 0), samples(one, 0)) <= (CLOSE if backend == "zero3" else 0)
    assert loss_apart(one, two) <= CLOSE
    for epoch in range(1, LAST + 1):
        assert same_weights(weights(one, epoch), weights(two, epoch), sharded=backend == "zero3")
    if backend == "ddp":  # gradients that are not reduced would show
        assert furthest(weights(one, LAST), weights(runs / "unreduced", LAST)) > 10 * CLOSE


def test_a_run_that_was_stopped_goes_on_bit_for_bit(runs, digests, rows):
    straight, stopped = runs / "straight", runs / "stopped"
    assert digests(stopped, LAST) == digests(straight, LAST)
    # The first epoch was the last one of the run that stopped there, and evaluated for that.
    assert rows(stopped)[2:] == rows(straight)[2:]


def test_a_run_goes_from_two_processes_to_one_and_back(backend, runs):
    straight, through = runs / "straight", runs / "through"
    assert furthest(samples(through, 1), samples(runs / "stopped", 1)) == 0
    for epoch in (2, LAST):
        assert same_weights(weights(through, epoch), weights(straight, epoch), sharded=backend == "zero3")
    assert furthest(weights(straight, LAST), weights(straight, 2)) > 10 * CLOSE
