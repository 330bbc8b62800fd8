"""Two processes train what one trains, and a run that was stopped continues bit for bit; the other files do more."""

import pytest

from tests.distributed.kills import torture
from tests.distributed.launching import EVEN, furthest, loss_apart, run_all, samples, weights

CLOSE = 1e-5
SETTINGS = (*EVEN, "epochs=2")


@pytest.mark.slow
def test_two_processes_equal_one_and_a_stopped_run_equals_the_straight_one(overrides, digests, rows, tmp_path):
    one, two, stopped = (tmp_path / name for name in ("one", "two", "stopped"))
    run_all("ddp", 1, {one: overrides(one, *SETTINGS)})
    run_all("ddp", 2, {two: overrides(two, *SETTINGS), stopped: overrides(stopped, *EVEN, "epochs=1")})
    run_all("ddp", 2, {stopped: overrides(stopped, *SETTINGS)})
    assert furthest(samples(two, 0), samples(one, 0)) == 0
    assert loss_apart(one, two) <= CLOSE
    for epoch in (1, 2):
        assert furthest(weights(one, epoch), weights(two, epoch)) <= CLOSE
    assert furthest(weights(one, 2), weights(one, 1)) > 10 * CLOSE
    assert digests(stopped, 2) == digests(two, 2)
    assert rows(stopped)[-1] == rows(two)[-1]


@pytest.mark.slow
def test_a_run_that_is_killed_once_ends_with_the_files_of_the_straight_one(tmp_path):
    torture(tmp_path, times=1, seed=1, processes=1)
