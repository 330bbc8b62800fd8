"""DDP and every stage of ZeRO compute what one process does, and a run moves between them and between numbers of
processes as if nothing had been."""

import shutil
from pathlib import Path

import pytest

from tests.distributed.launching import BACKENDS, EVEN, furthest, loss_apart, run_all, samples, weights
from tests.tiny import STOPPED

pytestmark = pytest.mark.slow

CLOSE = 1e-5
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
def runs(overrides, tmp_path_factory) -> Path:
    """Folders BACKEND/NAME of runs on two processes.

    `even` and `straight` go through. `stopped` ends after an epoch and goes on from there; `through` likewise, but
    makes its second epoch on one process, of ZeRO-1 and -2 without DeepSpeed. one/even is of one process.
    """
    folder = tmp_path_factory.mktemp("backends")

    def uneven(out: Path, epochs: int) -> list[str]:
        return overrides(out, *UNEVEN, f"epochs={epochs}")

    for backend in BACKENDS:
        place = folder / backend
        even, straight, stopped = (place / name for name in ("even", "straight", "stopped"))
        first = {even: overrides(even, *EVEN), straight: uneven(straight, LAST), stopped: uneven(stopped, 1)}
        if backend == "ddp":
            first[place / "unreduced"] = overrides(place / "unreduced", *EVEN)
        run_all(backend, 2, first)
        shutil.copytree(stopped, place / "through")
    through = [folder / backend / "through" for backend in BACKENDS]
    even = folder / "one" / "even"
    run_all("ddp", 1, {even: overrides(even, *EVEN)} | {out: uneven(out, 2) for out in through[:-1]})
    run_all("zero3", 1, {through[-1]: uneven(through[-1], 2)})
    for backend in BACKENDS:
        goes_on = (folder / backend / name for name in ("stopped", "through"))
        run_all(backend, 2, {out: uneven(out, LAST) for out in goes_on})
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_compute_what_one_does(runs, backend):
    one, two = runs / "one/even", runs / backend / "even"
    # A linear layer adds its bias apart under ZeRO-3.
    assert furthest(samples(two, 0), samples(one, 0)) <= (CLOSE if backend == "zero3" else 0)
    assert loss_apart(one, two) <= CLOSE
    for epoch in range(1, 6):
        assert furthest(weights(one, epoch), weights(two, epoch)) <= CLOSE


def test_gradients_that_are_not_reduced_give_other_weights(runs):
    assert furthest(weights(runs / "one/even", 5), weights(runs / "ddp/unreduced", 5)) > 10 * CLOSE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(runs, backend, digests, rows):
    straight, stopped = runs / backend / "straight", runs / backend / "stopped"
    assert digests(stopped, LAST) == digests(straight, LAST)
    # The first epoch was the last one of the run that stopped there, and evaluated for that.
    assert rows(stopped)[2:] == rows(straight)[2:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_from_two_processes_to_one_and_back(runs, backend):
    straight, through = runs / backend / "straight", runs / backend / "through"
    assert furthest(samples(through, 1), samples(runs / backend / "stopped", 1)) == 0
    for epoch in (2, LAST):
        assert furthest(weights(through, epoch), weights(straight, epoch)) <= CLOSE
    assert furthest(weights(straight, LAST), weights(straight, 2)) > 10 * CLOSE
