"""What the batch script does when a run has ended, without a scheduler: its commands only note how they are called."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STOPPED = "stopped by a signal after epoch 3 of 9; run again to continue"
DONE = "done: runs/it/before_after.png, curves.png, lora.safetensors, metrics.jsonl"
COMMANDS = {
    "accelerate": "echo ACCELERATE_MIXED_PRECISION=no",
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$*" >>"$NOTES"; fi',
    "squeue": 'echo "$STATE"',
    "srun": 'echo "$*" >"$NOTES.srun"; env >"$NOTES.env"\n'
    'log=${3#--output=}; echo "$SAID" >"${log/\\%t/0}"; '
    'case $SAID in stopped*) echo "${SAID%%;*}" >"$STITCH_NFT_STOP_MARKER" ;; esac; exit "$CODE"',
}


@pytest.fixture
def script(tmp_path):
    """script(what the run said, code=0, state="RUNNING", attempt=0) -> (the finished script, what was requeued)."""
    for name, body in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    notes = tmp_path / "notes"

    def run(
        said: str, code: int = 0, state: str = "RUNNING", attempt: int = 0, given: tuple[str, ...] = (), **more: str
    ):
        notes.write_text("")
        environment = os.environ | {
            "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LOGS": str(tmp_path / "logs"),
            "NOTES": str(notes),
            "SAID": said,
            "CODE": str(code),
            "STATE": state,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_RESTART_COUNT": str(attempt),
        }
        command = ["bash", "launch/slurm/nft.sbatch", "recipes/aesthetic.yaml", *given]
        done = subprocess.run(command, capture_output=True, text=True, env=environment | more)
        return done, notes.read_text()

    return run


def test_only_a_run_that_was_stopped_is_requeued(script):
    done, requeued = script(STOPPED)
    assert (done.returncode, requeued) == (0, "requeue 7\n"), done.stderr
    done, requeued = script(DONE)
    assert (done.returncode, requeued) == (0, "") and done.stdout.endswith(f"{DONE}\n")


def test_a_run_that_failed_fails_the_job_with_its_code_and_its_last_words(script):
    done, requeued = script("error: unknown recipe key epoch", code=2)
    assert (done.returncode, requeued) == (2, "") and "unknown recipe key" in done.stderr


def test_a_cancelled_job_is_not_requeued(script):
    done, requeued = script(STOPPED, state="COMPLETING")
    assert (done.returncode, requeued) == (0, "")


def test_a_job_that_is_stopped_three_times_at_one_epoch_gives_up(script):
    for attempt in (0, 1):
        assert script(STOPPED, attempt=attempt)[1] == "requeue 7\n"
    done, requeued = script(STOPPED, attempt=2)
    assert (done.returncode, requeued) == (1, "") and "give the job more time" in done.stderr


def test_a_job_that_gets_on_is_requeued_as_often_as_it_takes(script):
    for attempt in range(5):
        assert script(STOPPED.replace("epoch 3", f"epoch {attempt // 2}"), attempt=attempt)[1] == "requeue 7\n"


@pytest.mark.parametrize(
    ("given", "out"), [((), "runs/aesthetic-seed2"), (("out=elsewhere/mine",), "elsewhere/mine-seed2")]
)
def test_a_place_in_an_array_is_a_seed_with_a_folder_of_its_own(script, tmp_path, given, out):
    _, requeued = script(STOPPED, given=given, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    assert (tmp_path / "notes.srun").read_text().endswith(f" seed=2 out={out}\n")
    assert requeued == "requeue 5_2\n"  # the array's own number would start all of its seeds again


def test_what_the_accelerate_config_says_reaches_the_ranks(script, tmp_path):
    (tmp_path / "bin/accelerate").unlink()  # the real one
    config = Path("launch/accelerate/ddp.yaml").read_text() + "debug: true\n"
    (tmp_path / "debug.yaml").write_text(config)
    done, _ = script(DONE, ACCELERATE_CONFIG=str(tmp_path / "debug.yaml"))
    assert done.returncode == 0, done.stderr
    assert "ACCELERATE_DEBUG_MODE=true\n" in (tmp_path / "notes.env").read_text()


@pytest.mark.slow
def test_a_signal_that_comes_before_the_run_listens_waits_until_it_does(command, tmp_path):
    place = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    python, *arguments = command(tmp_path / "run", "epochs=1")
    process = subprocess.Popen(
        [python, "launch/slurm/rank.py", *arguments],
        env=os.environ | place | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29417"},
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(1)  # in which Python starts and PyTorch is not yet loaded
    process.send_signal(signal.SIGUSR1)
    told, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "stopped by a signal before the first epoch" in told and not (tmp_path / "run/checkpoints").exists()
