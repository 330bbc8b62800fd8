"""Rewards that are back-propagated by several processes, DDP and ZeRO alike, as by one."""

import json
from pathlib import Path

import pytest

from tests.distributed.launching import EVEN, WORKER, furthest, loss_apart, run_all, samples, start, weights
from tests.tiny import DRAFT, RECIPE, STOPPED

pytestmark = pytest.mark.slow

CLOSE = 1e-5
BACKENDS = (pytest.param("ddp", marks=pytest.mark.exhaustive), "zero3")  # test_draft_skips.py has DDP too
FULL = (*EVEN, *DRAFT, "epochs=3", "train.draft_steps=2", "train.gradient_checkpointing=true")
# Nine samples in five micro batches, the last one short: a process has none left where the other has one.
UNEVEN = ("rollout.groups=3", "rollout.group_size=3", "rollout.micro_batch=2", "train.updates_per_epoch=2")
WINDOW = (*EVEN, *UNEVEN, *DRAFT, *STOPPED, "checkpoint.keep=9", "train.draft_steps=1")
LAST = 3


def first_runs(place: Path, overrides) -> dict[Path, list[str]]:
    full, uneven, stopped = (place / name for name in ("full", "uneven", "stopped"))
    given = {full: overrides(full, *FULL), uneven: overrides(uneven, *WINDOW, f"epochs={LAST}")}
    return given | {stopped: overrides(stopped, *WINDOW, "epochs=1")}


@pytest.fixture(scope="module")
def one(overrides, tmp_path_factory) -> Path:
    """Folders NAME of runs on one process."""
    place = tmp_path_factory.mktemp("one")
    run_all("ddp", 1, first_runs(place, overrides))
    return place


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def two(backend, overrides, tmp_path_factory) -> Path:
    """Folders NAME of runs on two processes; `stopped` ends after an epoch and goes on."""
    place = tmp_path_factory.mktemp(backend)
    stopped = place / "stopped"
    run_all(backend, 2, first_runs(place, overrides))
    run_all(backend, 2, {stopped: overrides(stopped, *WINDOW, f"epochs={LAST}")})
    return place


@pytest.mark.parametrize("name", ["full", "uneven"])
def test_two_processes_compute_what_one_does(backend, one, two, name):
    alone, together = one / name, two / name
    # ZeRO-3 rounds otherwise: a linear layer adds its bias apart, and an adapter does not add in place.
    sharded = backend == "zero3"
    assert furthest(samples(together, 0), samples(alone, 0)) <= (CLOSE if sharded else 0)
    assert loss_apart(alone, together) <= CLOSE
    for epoch in range(1, LAST + 1):
        found = weights(together, epoch)  # the old policy's too, which a checkpoint may hold stale
        assert furthest(weights(alone, epoch), found) <= (3 * CLOSE if sharded else CLOSE)
    assert furthest(weights(alone, LAST), weights(alone, 1)) > 10 * CLOSE


def test_a_run_that_was_stopped_goes_on_bit_for_bit(two, digests, rows):
    straight, stopped = two / "uneven", two / "stopped"
    assert digests(stopped, LAST) == digests(straight, LAST)
    assert rows(stopped)[2:] == rows(straight)[2:]


def test_a_reward_that_fails_on_one_process_ends_both_with_its_name(overrides, tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text(
        "import os\n\n\ndef failing(images, prompts):\n"
        "    if images.requires_grad and os.environ['RANK'] == '1':\n"
        "        raise ValueError('the reward server is gone')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    reward = "rewards=[{kind: function, function: 'failing:failing'}]"
    out = tmp_path / "run"
    given = overrides(out, *EVEN, *DRAFT, reward)
    (tmp_path / "plan.json").write_text(
        json.dumps([{"recipe": RECIPE, "out": str(out), "overrides": given, "fault": None}])
    )
    script = tmp_path / "worker.py"
    script.write_text(f"import sys\n\nsys.path.insert(0, {str(tmp_path)!r})\n" + WORKER.read_text())
    done = start("ddp", 2, script, tmp_path / "plan.json", timeout=150)
    assert done.returncode != 0 and not (out / "checkpoints").exists()
    assert "failing raised ValueError: the reward server is gone" in done.stderr
