"""A signal ends a run with one complete checkpoint, in whatever phase it comes, and nothing of the result changes."""

import os
import signal
import subprocess
import sys

import pytest
from diffusers import StableDiffusion3Pipeline

from nft.config import load_recipe
from nft.trainer import Trainer
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.launcher import make_accelerator
from stitchvm_reward.runs.rank_sync import RankSync, Stopped
from stitchvm_reward.runs.tracking import Timings
from tests.tiny import RECIPE, STOPPED

EPOCHS = 4
# Several updates an epoch, so that a stopped one must be undone, and an evaluation after every second epoch.
SETTINGS = (f"epochs={EPOCHS}", "train.updates_per_epoch=2", "evaluation.every=2", "checkpoint.every=3")


@pytest.fixture
def restored_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    train(folder / "full", *SETTINGS)
    train(folder / "stopped", *SETTINGS, *STOPPED)
    return folder


def signalled(monkeypatch, phase: str, number: int, at: int) -> None:
    """Send this process a signal as it enters a phase for the `at`-th time."""
    entered, original = [], Timings.phase

    def interrupted(self, name):
        entered.append(name)
        if entered.count(phase) == at and name == phase:
            os.kill(os.getpid(), number)
        return original(self, name)

    monkeypatch.setattr(Timings, "phase", interrupted)


def run(overrides, out, settings) -> bool:
    accelerator = make_accelerator()
    ranks = RankSync(accelerator)
    ranks.listen()
    return Trainer(load_recipe(RECIPE, overrides(out, *settings)), accelerator, ranks).train()


@pytest.mark.parametrize(
    ("kind", "phase", "at", "kept"),
    [
        ("full", "rollout", 3, 1),
        pytest.param("full", "decode", 4, 1, marks=pytest.mark.slow),
        pytest.param("full", "score", 5, 2, marks=pytest.mark.slow),
        ("full", "train", 2, 1),
        pytest.param("full", "evaluate", 1, 0, marks=pytest.mark.slow),
        ("full", "evaluate", 2, 2),
        pytest.param("full", "save", 1, 3, marks=pytest.mark.slow),
        pytest.param("stopped", "audit", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_any_phase_leaves_one_checkpoint_that_goes_on_as_if_nothing_had_been(
    straight, overrides, digests, rows, restored_handlers, monkeypatch, tmp_path, kind, phase, at, kept
):
    settings = (*SETTINGS, *STOPPED) if kind == "stopped" else SETTINGS
    number = signal.SIGUSR1 if at % 2 else signal.SIGTERM
    with monkeypatch.context() as patch:
        signalled(patch, phase, number, at)
        assert run(overrides, tmp_path / "run", settings) is False
    checkpoints = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert checkpoints == [f"epoch-{kept:06d}"]
    assert run(overrides, tmp_path / "run", settings) is True
    assert digests(tmp_path / "run", EPOCHS) == digests(straight / kind, EPOCHS)
    assert rows(tmp_path / "run") == rows(straight / kind)


def test_a_signal_while_prompts_are_encoded_ends_the_run_before_it_begins(
    overrides, restored_handlers, monkeypatch, tmp_path
):
    encode = StableDiffusion3Pipeline.encode_prompt

    def signalled_encode(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(*arguments, **options)

    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", signalled_encode)
    with pytest.raises(Stopped):
        run(overrides, tmp_path / "run", (*SETTINGS, f"prompts.cache={tmp_path}/cache"))
    assert not (tmp_path / "run").exists() and any((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.slow
def test_the_command_ends_with_0_on_the_first_signal_and_at_once_on_the_second(overrides, tmp_path):
    def start(times: int) -> subprocess.CompletedProcess:
        script = tmp_path / "start.py"
        script.write_text(
            "import os, runpy, signal, sys\n"
            "from stitchvm_reward.runs.tracking import Timings\n"
            "original = Timings.phase\n"
            "def watchdog(self, name):\n"
            f"    for _ in range({times} if name == 'train' else 0):\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n"
            "    return original(self, name)\n"
            "Timings.phase = watchdog\n"
            "sys.argv = sys.argv[1:]\n"
            "runpy.run_path('launch/nft.py', run_name='__main__')\n"
        )
        given = overrides(tmp_path / f"run-{times}", *SETTINGS)
        environment = os.environ | {"PYTHONPATH": os.getcwd()}
        command = [sys.executable, str(script), "launch/nft.py", RECIPE, *given]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    once, twice = start(1), start(2)
    assert once.returncode == 0, once.stderr
    assert "stopped by a signal after epoch 0 of 4; run again to continue" in once.stdout and "done:" not in once.stdout
    assert (tmp_path / "run-1/checkpoints/epoch-000000/manifest.json").exists()
    assert twice.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "run-2/checkpoints").exists()


@pytest.mark.slow
def test_two_runs_cannot_write_one_folder(overrides, make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", *SETTINGS)
    assert trainer.claim is not None
    command = [sys.executable, "launch/nft.py", RECIPE, *overrides(tmp_path / "run", *SETTINGS)]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert f"another run is writing {tmp_path / 'run'} (process {os.getpid()} on" in second.stderr
    trainer.claim.close()
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0


def test_a_full_disk_harms_no_earlier_checkpoint(train, make_trainer, digests, tmp_path, monkeypatch):
    train(tmp_path / "run", "epochs=1")
    before = digests(tmp_path / "run", 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stitchvm_reward.runs.checkpoint.save_file", full)
    with pytest.raises(InputError, match=r"cannot write checkpoint epoch-000002 .*No space left.*make room"):
        train(tmp_path / "run", "epochs=2")
    assert digests(tmp_path / "run", 1) == before
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["epoch-000001"]
