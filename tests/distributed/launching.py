"""Runs of the miniature on several processes, by any backend, and how far apart two of them are."""

import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from functools import cache
from multiprocessing import connection, forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate.utils.other import get_free_port
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import RECIPE, ROOT

WORKER = Path(__file__).with_name("worker.py")
BACKENDS = ("ddp", "zero1", "zero2", "zero3")
SINGLE = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # what DeepSpeed and torch read as they are imported
FAULTS = ("unreduced", "moments", "old")
# Three optimizer steps; one process has two micro batches for each, two processes one.
EVEN = (
    "rollout.groups=2",
    "rollout.group_size=4",
    "rollout.micro_batch=4",
    "train.learning_rate=1e-4",
    "epochs=3",
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


@cache
def environments(backend: str, processes: int) -> list[dict[str, str]]:
    """The variables that the launcher gives to each process, but for its own store, which ends with it."""
    with TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(
            "import json, os\n"
            "from pathlib import Path\n"
            "path = Path(__file__).with_name(os.environ.get('RANK', '0') + '.json')\n"
            "path.write_text(json.dumps(dict(os.environ)))\n"
        )
        command = [*launcher(backend, processes), str(script)]
        subprocess.run(command, cwd=ROOT, env=os.environ | SINGLE, check=True, capture_output=True, timeout=120)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]
    return [{name: value for name, value in told.items() if "TORCHELASTIC" not in name} for told in found]


def start(backend: str, processes: int, worker: Path, plan: Path, timeout: float) -> subprocess.CompletedProcess:
    """Run a worker script with its plan on so many processes; the first that fails ends the others.

    The processes are forks of one that has imported the trainer already, because the import takes longer than a short
    run. Raises TimeoutError.
    """
    context = _fork_server()
    outputs = plan.parent / "output.txt", plan.parent / "errors.txt"
    for path in outputs:
        path.write_text("")
    started = []
    rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(get_free_port())}
    for told in environments(backend, processes):
        environment = told | rendezvous if "RANK" in told else told
        process = context.Process(target=_run_script, args=(worker, plan, environment, outputs), daemon=True)
        process.start()
        started.append(process)
    end = time.monotonic() + timeout
    while (alive := [process for process in started if process.is_alive()]) and time.monotonic() < end:
        if any(process.exitcode for process in started):
            end = min(end, time.monotonic() + 60)
            for process in alive:
                process.terminate()
        connection.wait([process.sentinel for process in alive], timeout=1)
    for process in alive:
        process.kill()
    failed = next((process.exitcode for process in started if process.exitcode), 0)
    if alive and not failed:
        raise TimeoutError(f"{len(alive)} of {processes} processes were still running after {timeout:g} s")
    return subprocess.CompletedProcess([str(worker)], failed, *(path.read_text() for path in outputs))


@cache
def _fork_server() -> ForkServerContext:
    """A process that has imported everything that a worker needs, with one thread; workers are forked from it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "matplotlib.pyplot", "nft.trainer", "stitchvm_reward.stitching.build"])
    before = {name: os.environ.get(name) for name in SINGLE}
    os.environ |= SINGLE
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def _run_script(worker: Path, plan: Path, environment: dict[str, str], outputs: tuple[Path, Path]) -> None:
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ |= environment
    os.chdir(ROOT)
    sys.path[:0] = [str(worker.parent), str(ROOT)]
    sys.argv = [str(worker), str(plan)]
    try:
        runpy.run_path(str(worker), run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


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


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor], sharded: bool) -> bool:
    """Whether two runs' adapters are equal but for rounding; `sharded` where one of them ran under ZeRO-3.

    ZeRO-3 adds a linear layer's bias in a separate operation. Adam divides a gradient by its own size: where that is
    nearly zero, rounding decides most of a step, which is 1e-4, in a few places.
    """
    if not sharded:
        return furthest(first, second) <= 1e-5
    apart = sum(int(((first[key] - second[key]).abs() > 1e-6).sum()) for key in first)
    return furthest(first, second) <= 5e-5 and apart <= 1e-3 * sum(tensor.numel() for tensor in first.values())


def losses(run: Path) -> list[float]:
    """The policy loss of each epoch."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/policy_loss"] for row in found if "train/policy_loss" in row]


def loss_apart(first: Path, second: Path) -> float:
    """The largest difference between the losses of two runs' epochs."""
    return max(abs(ours - theirs) for ours, theirs in zip(losses(first), losses(second), strict=True))
