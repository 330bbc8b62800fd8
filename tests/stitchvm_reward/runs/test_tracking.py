"""What a run leaves behind to read."""

import json
import re

import pytest
import torch

from nft.evaluation.summary import read_run, summary_lines
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.pictures import before_after, curves
from stitchvm_reward.runs.tracking import Timings, Tracker, read_metrics, read_scores


def write(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(epoch, reward):
    held_out = {"held_out/total": reward, "held_out/total_std": 0.5}
    return {
        "epoch": epoch,
        "step": epoch,
        "reward/total": reward,
        "seconds/train": 3.0,
        "images_per_second": 2.0,
    } | held_out


def test_resuming_drops_the_rows_that_will_be_written_again(tmp_path):
    write(tmp_path, [row(0, 1.0), row(1, 2.0), row(2, 3.0)])
    tracker = Tracker(tmp_path, first=2)
    tracker.log(2, 2, {"reward/total": 9.0})
    tracker.close()
    assert [found["epoch"] for found in read_metrics(tmp_path)] == [0, 1, 2]
    assert read_metrics(tmp_path)[-1]["reward/total"] == 9.0


def test_a_fresh_run_starts_an_empty_record(tmp_path):
    write(tmp_path, [row(0, 1.0)])
    Tracker(tmp_path, first=0).close()
    assert read_metrics(tmp_path) == []


def test_each_prompts_scores_are_kept_by_epoch_and_a_resumed_run_writes_its_own_again(tmp_path):
    first = Tracker(tmp_path, first=0)
    first.scores(0, {"total": torch.tensor([1.0, 2.0])})
    first.scores(2, {"total": torch.tensor([3.0, 1 / 3])})
    again = Tracker(tmp_path, first=2)
    again.scores(2, {"total": torch.tensor([5.0, 1 / 3])})
    assert read_scores(tmp_path) == {0: {"total": [1.0, 2.0]}, 2: {"total": [5.0, 0.3333333]}}
    Tracker(tmp_path / "stitch", first=0).close()
    assert not (tmp_path / "stitch/held_out.jsonl").exists()


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    write(tmp_path, [row(0, 1.0)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "rew')
    assert [found["epoch"] for found in read_metrics(tmp_path)] == [0]


def test_the_summary_shows_change_spread_and_where_the_time_went_of_each_run(tmp_path):
    for name, last in (("first", 4.0), ("second", 2.0)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [row(0, 1.0), row(1, 1.5), row(2, last)])
        tracker = Tracker(tmp_path / name, first=3)
        for epoch, mean in ((0, 1.0), (1, 1.5), (2, last)):
            tracker.scores(epoch, {"total": torch.tensor([mean - 0.5, mean + 0.5] * 8), "always": torch.ones(16)})
    text = "\n".join(summary_lines([read_run(tmp_path / name) for name in ("first", "second")]))
    # Every prompt gains the same: there is nothing that resampled prompts could change.
    assert "4.000 (0.516) +3.000 [+3.000, +3.000]" in text and "2.000 (0.516) +1.000 [+1.000, +1.000]" in text
    assert "1.000 (0.000) +0.000 [+0.000, +0.000]" in text and "95% interval over prompts" in text
    assert "9.0 s" in text and "100%" in text


def test_the_interval_of_a_change_is_paired_by_prompt(tmp_path):
    write(tmp_path, [row(0, 0.0), row(1, 1.0)])
    tracker, before = Tracker(tmp_path, first=2), torch.arange(20.0)
    tracker.scores(0, {"total": before})
    tracker.scores(1, {"total": before + torch.tensor([0.0, 2.0] * 10)})
    found = re.search(r"\+1\.000 \[\+(\S+), \+(\S+)\]", "\n".join(summary_lines([read_run(tmp_path)])))
    low, high = map(float, found.groups())
    # Half of 20 prompts gain 2: a binomial's standard error, and nothing of the spread of the prompts themselves.
    assert high - low == pytest.approx(4 * 20**-0.5, rel=0.15)


def test_a_run_of_an_earlier_version_has_no_summary(tmp_path):
    write(tmp_path, [row(0, 1.0), row(1, 2.0)])
    with pytest.raises(InputError, match="lacks the scores of each held-out prompt"):
        read_run(tmp_path)


def test_a_run_that_never_finished_has_no_summary(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        read_run(tmp_path)


def test_phases_add_up_until_taken():
    timings = Timings()
    for _ in range(2):
        with timings.phase("a"):
            pass
    assert set(timings.take()) == {"seconds/a"}
    assert timings.take() == {}


def test_pictures_and_curves_are_written(tmp_path):
    images = torch.rand(3, 3, 64, 64)
    before_after(images, 1 - images, ["one", "two", "a prompt too long for its place " * 4], tmp_path / "pairs.png")
    write(tmp_path, [row(0, 1.0), row(1, 2.0)])
    curves(tmp_path)
    assert (tmp_path / "pairs.png").stat().st_size > 1000
    assert (tmp_path / "curves.png").stat().st_size > 1000


class Device:
    """A clock, and a device that works behind the program: asking for work takes no time, waiting for it does."""

    def __init__(self):
        self.now, self.queued, self.timings = 0.0, 0.0, Timings(self.wait, lambda: self.now)

    def wait(self):
        self.now, self.queued = self.now + self.queued, 0.0

    def work(self, seconds):
        self.queued += seconds


def test_work_on_a_device_counts_in_the_phase_that_asked_for_it():
    device = Device()
    with device.timings.phase("rollout"):
        device.work(3.0)
    with device.timings.phase("decode"):
        device.work(1.0)
    assert device.timings.take() == {"seconds/rollout": 3.0, "seconds/decode": 1.0}
    assert device.now == 4.0  # no work is left to wait for outside the phases


def test_waiting_for_a_device_is_not_waiting_for_other_processes():
    device = Device()
    with device.timings.phase("train"):
        device.work(5.0)
        with device.timings.meeting():
            device.now += 2.0  # the other process is slower
        device.work(1.0)
    assert device.timings.take() == {"seconds/train": 6.0, "seconds/meet": 2.0}


def test_work_before_a_phase_inside_another_counts_in_the_outer_one():
    device = Device()
    with device.timings.phase("audit"):
        device.work(4.0)
        with device.timings.phase("score"):
            device.work(0.5)
    assert device.timings.take() == {"seconds/audit": 4.0, "seconds/score": 0.5}


def test_a_failure_in_a_phase_is_not_followed_by_a_wait():
    device = Device()
    with pytest.raises(KeyError), device.timings.phase("rollout"):
        device.work(3.0)
        raise KeyError
    assert device.now == 0.0
