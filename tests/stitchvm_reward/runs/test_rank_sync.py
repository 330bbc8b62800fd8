"""A process stops at a meeting, once; one that waits for ever is ended with the phase that it is in."""

import subprocess
import sys
import textwrap
import time

import pytest

from stitchvm_reward.errors import InputError, SharedError
from stitchvm_reward.runs.launcher import make_accelerator
from stitchvm_reward.runs.rank_sync import RankSync, Stopped
from stitchvm_reward.runs.tracking import Timings


@pytest.fixture
def ranks():
    return RankSync(make_accelerator())


def test_a_wish_to_stop_is_raised_at_the_next_meeting_and_only_once(ranks):
    ranks.sync()
    ranks.asked = True
    with pytest.raises(Stopped):
        ranks.sync()
    ranks.sync()
    with ranks.together():  # what is saved last must not be stopped again
        saved = True
    assert saved


def test_what_goes_wrong_is_raised_as_it_is_and_a_users_mistake_as_one_that_all_know(ranks):
    with pytest.raises(ZeroDivisionError), ranks.together():
        raise ZeroDivisionError("x")
    with pytest.raises(SharedError, match="no such folder"), ranks.together():
        raise InputError("no such folder")


def test_rounds_give_each_item_and_a_meeting_after_it(ranks):
    done = []
    with pytest.raises(Stopped):
        for value in ranks.rounds([1, 2, 3]):
            with ranks.together():
                done.append(value)
                ranks.asked = value == 2
    assert done == [1, 2]


def test_before_a_meeting_a_process_joins_in_what_the_others_still_do(ranks):
    order = []
    ranks.idle = lambda: order.append("idle")
    with ranks.together():
        order.append("work")
    assert order == ["work", "idle"]


def watchdog(body: str, seconds: float) -> subprocess.CompletedProcess:
    script = f"""
        import time
        from stitchvm_reward.runs.rank_sync import watchdog
        from stitchvm_reward.runs.tracking import Timings
        timings = Timings()
        with watchdog(timings, {seconds}, 1):
            {body}
        print("came to its end")
        """
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)


def test_a_process_that_does_not_move_ends_with_the_phase_it_is_in():
    done = watchdog('with timings.phase("rollout"): time.sleep(60)', 0.5)
    assert done.returncode == 1
    assert done.stderr.startswith("error: process 1 has not advanced for 0.5 s in phase rollout: ")
    assert done.stderr.count("\n") == 1


def test_a_process_that_moves_is_left_alone_however_long_it_takes():
    done = watchdog("[(time.sleep(0.2), timings.move()) for _ in range(10)]", 1.0)
    assert (done.returncode, done.stdout) == (0, "came to its end\n"), done.stderr


def test_a_phase_inside_another_is_not_counted_twice():
    timings = Timings()
    with timings.phase("train"), timings.meeting():
        assert timings.current == "train, waiting for other processes"
        time.sleep(0.2)
    assert timings.current == "train"
    found = timings.take()
    assert found["seconds/meet"] >= 0.2 > found["seconds/train"]
