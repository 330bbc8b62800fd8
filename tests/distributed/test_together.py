"""Two processes stop together: a signal to one of them, or a fault on one, is known to both at the same step."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from stitchvm_reward.runs import checkpoint
from tests.distributed.launching import launcher, start
from tests.tiny import RECIPE

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("together.py")
EPOCHS = 3
SETTINGS = (
    f"epochs={EPOCHS}",
    "rollout.groups=3",  # twelve samples in three micro batches, of which one process has two
    "evaluation.every=2",
    "checkpoint.keep=9",
)
PHASES = {"encode": 1, "rollout": 3, "decode": 2, "score": 2, "train": 2, "evaluate": 2, "save": 1}


@pytest.fixture(scope="module")
def launch(overrides, tmp_path_factory):
    """launch(runs, folder, backend) -> the finished process: all runs in one start of two processes."""

    def start_runs(runs: list[dict], folder: Path, backend: str = "ddp") -> subprocess.CompletedProcess:
        plan = [
            {
                "out": str(folder / run["name"]),
                "overrides": overrides(folder / run["name"], *SETTINGS, *run["settings"]),
            }
            | {key: run[key] for key in ("signal", "fault") if key in run}
            for run in runs
        ]
        (folder / "plan.json").write_text(json.dumps(plan))
        return start(backend, 2, WORKER, folder / "plan.json", timeout=500)

    return start_runs


@pytest.fixture(scope="module")
def signalled(launch, tmp_path_factory):
    """The undisturbed run, and for each phase one that was stopped in it and one that goes on from there."""
    folder = tmp_path_factory.mktemp("signalled")
    runs = [{"name": "straight", "settings": ()}]
    for number, (phase, at) in enumerate(PHASES.items()):
        runs.append({"name": phase, "settings": (), "signal": [number % 2 if phase != "save" else 0, phase, at]})
    done = launch(runs, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    stopped = {phase: [path.name for path in (folder / phase).glob("checkpoints/*")] for phase in PHASES}
    finished = {phase: [(folder / f"{phase}.finished-{rank}").read_text() for rank in (0, 1)] for phase in PHASES}
    done = launch([{"name": phase, "settings": ()} for phase in PHASES], folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, stopped, finished


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_to_one_process_stops_both_and_the_run_goes_on_bit_for_bit(signalled, digests, rows, phase):
    folder, stopped, finished = signalled
    assert finished[phase] == ["False", "False"]
    # While prompts are encoded nothing has been trained that could be saved.
    assert bool(stopped[phase]) == (phase != "encode")
    assert digests(folder / phase, EPOCHS) == digests(folder / "straight", EPOCHS)
    assert rows(folder / phase) == rows(folder / "straight")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("reward_raises", "ValueError: the reward server is gone"),
        (
            "reward_nan",
            "error: reward aesthetic gave 4 of 12 scores that are not finite in epoch 2: nothing was applied",
        ),
        ("gradient_nan", "the gradient is not finite in epoch 2, update 1"),
        ("encode_raises", "ValueError: the tokenizer is broken"),
    ],
)
def test_a_fault_on_one_process_stops_both_with_one_message_and_saves_nothing_more(launch, tmp_path, kind, told):
    done = launch([{"name": "run", "settings": (), "fault": [1, kind]}], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count(told) == 1, done.stderr[-4000:]
    saved = [path.name for path in (tmp_path / "run").glob("checkpoints/*")]
    assert saved == ([] if kind == "encode_raises" else ["epoch-000001"])


@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3"])
def test_a_fault_may_be_skipped_on_both_alike(launch, tmp_path, rows, backend):
    skip = ("train.on_nonfinite=skip", "train.most_skips=2")
    done = launch([{"name": "run", "settings": skip, "fault": [1, "gradient_nan"]}], tmp_path, backend)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 1, 1]
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())][-1] == "epoch-000003"


def test_a_process_that_hangs_ends_the_run_with_the_phase_that_it_hangs_in(overrides, tmp_path):
    """What one process waits for may never come: both say where they are, and the last checkpoint stays."""
    (tmp_path / "sticking.py").write_text(
        "import os, time\n"
        "calls = []\n"
        "def reward(images, prompts):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 3:\n"
        "        time.sleep(600)\n"
        "    return images.mean(dim=(1, 2, 3))\n"
    )
    settings = ("epochs=3", "timeout=15", "rewards=[{kind: function, function: sticking:reward}]")
    done = subprocess.run(
        [*launcher("ddp", 2), "launch/nft.py", RECIPE, *overrides(tmp_path / "run", *settings)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path.cwd()}:{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "error: process 1 has not advanced for 15 s in phase score, in sticking:reward: " in done.stderr, (
        done.stderr[-4000:]
    )
    saved = tmp_path / "run/checkpoints/epoch-000001"
    assert saved.is_dir() and checkpoint.damage(saved) is None
