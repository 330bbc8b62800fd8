"""A SLURM cluster of one machine, for the tests: its own configuration, keys and ports, gone when they are through."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PLACES = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where daemons are, though not always looked for
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
# A requeued job waits until its old credential is void.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# More processors than there may be: the jobs of these tests mostly wait.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={processors} RealMemory=1000
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be set up here, or None."""
    if os.geteuid() != 0:
        return "needs root, as whom SLURM's daemons run"
    absent = [name for name in (*DAEMONS, "sbatch", "srun") if shutil.which(name, path=PLACES) is None]
    return f"needs {', '.join(absent)}: make slurm" if absent else None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(condition: Callable[[], bool], seconds: float, told: Callable[[], object]) -> None:
    """Return once the condition holds. Raises TimeoutError with what `told` returns."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not after {seconds} seconds: {told()}")
        time.sleep(0.5)


def ask(*command: str, environment: dict[str, str]) -> str:
    """What a SLURM command prints, or nothing where it fails."""
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30).stdout


@contextmanager
def cluster(processors: int) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and its like speak to a cluster of one node that has started."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged refuses a socket that others cannot reach
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o600)
    ports = {"controller": _free_port(), "node": _free_port()}
    text = CONFIGURATION.format(folder=folder, host=socket.gethostname(), processors=processors, **ports)
    (folder / "slurm.conf").write_text(text)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    commands = {
        "munged": ["--foreground", *(f"--{option}={folder}/munge.{end}" for option, end in options.items())],
        "slurmctld": ["-D"],
        "slurmd": ["-D", "-N", "localhost"],
    }
    started: list[subprocess.Popen] = []
    try:
        for name, arguments in commands.items():
            with (folder / f"{name}.out").open("w") as file:
                started.append(
                    subprocess.Popen(
                        [str(shutil.which(name, path=PLACES)), *arguments], env=environment, stdout=file, stderr=file
                    )
                )
            if name == "munged":
                wait_for((folder / "munge.socket").exists, 20, lambda: _logs(folder))
        wait_for(lambda: "idle" in ask("sinfo", environment=environment), 30, lambda: _logs(folder))
        yield environment
    finally:
        ask("scancel", "--user=root", environment=environment)
        try:
            wait_for(lambda: not ask("squeue", "--noheader", environment=environment), 40, lambda: _logs(folder))
        finally:
            for process in reversed(started):
                process.terminate()
                process.wait(20)
            shutil.rmtree(folder)


def _logs(folder: Path) -> str:
    return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(folder.glob("*.[lo][ou][gt]")))
