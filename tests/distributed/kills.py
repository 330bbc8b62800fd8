"""Kills a run at random moments, during saves among them, and looks whether every restart goes on as if nothing were.

python -m tests.distributed.kills --times 30 --seed 0
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stitchvm_reward.runs import checkpoint
from stitchvm_reward.runs.tracking import read_metrics
from tests.distributed.launching import launcher
from tests.tiny import RECIPE, ROOT, TINY, few_prompts

EPOCHS = 6
SETTINGS = (f"epochs={EPOCHS}", "train.updates_per_epoch=2", "evaluation.every=2", f"checkpoint.keep={EPOCHS + 1}")
PATIENCE = 300  # seconds that a start may take


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


class Run:
    """One run folder and its processes."""

    def __init__(self, backend: str, processes: int, out: Path, prompts: tuple[str, ...]):
        self.processes, self.out = processes, out
        given = [*TINY, *prompts, *SETTINGS, f"out={out}"]
        self.command = [*launcher(backend, processes), "launch/nft.py", RECIPE, *given]
        self.log = out.with_suffix(".log")

    def start(self) -> None:
        """Start it in a session of its own and wait until its first epoch may begin."""
        before = self._began()
        with self.log.open("wb") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + PATIENCE
        while self._began() == before and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)

    def _began(self) -> int:
        """When the metrics file was last made anew: every start does that once all has loaded."""
        path = self.out / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def workers(self) -> list[int]:
        """The training processes, by rank; the launcher is none of them where there is one."""
        if self.processes == 1:
            return [self.process.pid]
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in task.read_text().split()]

    def kill(self, draw: random.Random) -> str:
        """Kill -9 everything, or one of several ranks; returns what was done."""
        workers = self.workers()
        if len(workers) > 1 and draw.random() < 0.5:
            rank = draw.randrange(len(workers))
            os.kill(workers[rank], signal.SIGKILL)
            told = f"process {rank} killed"
        else:
            os.killpg(self.process.pid, signal.SIGKILL)
            for worker in workers:
                _kill(worker)
            told = "all killed"
        self.process.wait(PATIENCE)
        for worker in workers:
            _gone(worker)
        return told

    def saving(self) -> bool:
        """Whether a checkpoint is being written now."""
        return any(self.out.glob("checkpoints/.*.staged"))


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _gone(pid: int) -> None:
    """Wait for a process that another one has to collect."""
    end = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.01)


def check(run: Run, straight: Path) -> str:
    """What a killed run has left, in words. Raises AssertionError for anything that the straight run does not have."""
    found = checkpoint.complete(run.out / "checkpoints")
    for path in found:
        assert checkpoint.damage(path) is None, f"{path.name} is damaged"
        assert _files(path) == _files(straight / "checkpoints" / path.name), f"{path.name} is another than straight"
    newest = int(found[-1].name[-6:]) if found else 0
    logged = [int(row["epoch"]) for row in read_metrics(run.out)]
    # An epoch's row is written before its checkpoint, and that while the next epoch is under way.
    assert newest >= max(logged, default=0) - 2, f"epochs {logged} are logged and only {newest} is saved"
    return f"{len(found)} checkpoints whole and as they should be, the newest of epoch {newest}"


def finish(run: Run, straight: Path) -> None:
    """Let a run go to its end and compare it with the straight one."""
    run.start()
    assert run.process.wait(PATIENCE) == 0, run.log.read_text()[-3000:]
    check(run, straight)
    assert len(checkpoint.complete(run.out / "checkpoints")) == EPOCHS

    def figures(folder: Path) -> list[dict[str, float]]:
        rows = read_metrics(folder)
        return [{k: v for k, v in row.items() if not k.startswith(("seconds", "images"))} for row in rows]

    assert figures(run.out) == figures(straight), "the figures differ"


def torture(folder: Path, times: int, seed: int, processes: int, backend: str = "ddp") -> int:
    """Kill runs in `folder` `times` times, each at a moment drawn from the seed; returns how many kills hit a save."""
    draw, prompts = random.Random(seed), few_prompts(folder / "prompts")
    straight = Run(backend, processes, folder / "straight", prompts)
    straight.start()
    began = time.monotonic()
    assert straight.process.wait(PATIENCE) == 0, straight.log.read_text()[-3000:]
    epoch = (time.monotonic() - began) / EPOCHS
    kills, saves, turn, run = 0, 0, 0, Run(backend, processes, folder / "killed-0", prompts)
    while kills < times:
        run.start()
        wait = draw.uniform(0, 1.5 * epoch)
        end, in_save = time.monotonic() + wait, draw.random() < 0.4
        # A save is short: every kill that is meant for one waits for the next to begin.
        while run.process.poll() is None and (time.monotonic() < end or (in_save and not run.saving())):
            time.sleep(0.0005)
        if run.process.poll() is None:
            hit = run.saving()
            kills, saves = kills + 1, saves + hit
            told = run.kill(draw)
            what = f"{told} {wait:.2f} s after its start" + (", in a save" if hit else "")
        else:
            assert run.process.returncode == 0, run.log.read_text()[-3000:]
            what = "came to its end first"
        print(f"{kills:3}  {run.out.name}: {what}; {check(run, straight.out)}", flush=True)
        if len(checkpoint.complete(run.out / "checkpoints")) == EPOCHS:
            finish(run, straight.out)
            turn += 1
            run = Run(backend, processes, folder / f"killed-{turn}", prompts)
    finish(run, straight.out)
    print(f"{times} kills, {saves} of them in a save: every run ended with the files and figures of the straight one")
    return saves


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.kills", description=__doc__)
    parser.add_argument("--times", type=int, default=30, help="kills; default: 30")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    parser.add_argument("--processes", type=int, default=2, help="of the run; default: 2")
    parser.add_argument("--backend", default="ddp", help="ddp, zero1, zero2 or zero3; default: ddp")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torture(Path(folder), arguments.times, arguments.seed, arguments.processes, arguments.backend)
    return 0


if __name__ == "__main__":
    sys.exit(main())
