"""Runs of the miniature on several processes, by any backend, and how far apart two of them are."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import RECIPE, ROOT

WORKER = Path(__file__).with_name("worker.py")
BACKENDS = ("ddp", "zero1", "zero2", "zero3")
FAULTS = ("unreduced", "moments", "old")
# Five optimizer steps; one process has two micro batches for each, two processes one.
EVEN = (
    "rollout.groups=2",
    "rollout.group_size=4",
    "rollout.micro_batch=4",
    "train.learning_rate=1e-4",
    "epochs=5",
    "checkpoint.keep=5",
    "evaluation.samples=2",
    "evaluation.grid=1",
    "evaluation.steps=1",
)


def launcher(backend: str, processes: int) -> list[str]:
    """The command that starts so many processes: `ddp`, or one of launch/accelerate's zero1, zero2, zero3."""
    if backend == "ddp":
        if processes == 1:
            return [sys.executable]
        # On CPUs accelerate's launcher starts one process, whatever it is asked for.
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    config = ["--config_file", f"launch/accelerate/{backend}.yaml", "--num_processes", str(processes)]
    return [sys.executable, "-m", "accelerate.commands.launch", *config]


def start(backend: str, processes: int, worker: Path, plan: Path, timeout: float) -> subprocess.CompletedProcess:
    """Start a worker script with its plan on so many processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher(backend, processes), str(worker), str(plan)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def run_all(backend: str, processes: int, runs: dict[Path, list[str]]) -> None:
    """Make runs {folder: overrides} one after the other in one start; one named for a fault of FAULTS has it."""
    make_runs(backend, processes, list(runs.items()))


def make_runs(backend: str, processes: int, runs: list[tuple[Path, list[str]]]) -> None:
    """Make runs (folder, overrides) one after the other in one start, as `run_all`; a folder may occur again."""
    plan = [
        {"recipe": RECIPE, "out": str(out), "overrides": given, "fault": out.name if out.name in FAULTS else None}
        for out, given in runs
    ]
    path = runs[0][0].parent / f"plan-{backend}-{processes}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan))
    done = start(backend, processes, WORKER, path, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def samples(run: Path, epoch: int) -> dict[str, Tensor]:
    """What all processes together collected in the epoch that a run began or went on with."""
    return {k: t for path in run.glob(f"epoch-{epoch}-rank-*.safetensors") for k, t in load_file(path).items()}


def weights(run: Path, epoch: int) -> dict[str, Tensor]:
    """All adapters after an epoch."""
    return load_file(run / "checkpoints" / f"epoch-{epoch:06d}" / "adapters.safetensors")


def furthest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference between two sets of tensors."""
    assert first.keys() == second.keys() and first
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def losses(run: Path) -> list[float]:
    """The policy loss of each epoch."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/policy_loss"] for row in found if "train/policy_loss" in row]


def loss_apart(first: Path, second: Path) -> float:
    """The largest difference between the losses of two runs' epochs."""
    return max(abs(ours - theirs) for ours, theirs in zip(losses(first), losses(second), strict=True))
