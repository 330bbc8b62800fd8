"""A run that is killed with -9 goes on as if nothing had been; the command kills it more often."""

import pytest

from tests.distributed.kills import torture

pytestmark = pytest.mark.slow


def test_a_run_of_two_processes_that_is_killed_twice_ends_with_the_files_of_the_straight_one(tmp_path):
    torture(tmp_path, times=2, seed=1, processes=2)
