"""The batch script on a real scheduler: stopped before its time is over, requeued, and the same as if it never was."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import ask, cluster, missing, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=f"{missing()}")]
SCRIPT, RECIPE, EPOCHS = "launch/slurm/nft.sbatch", "recipes/shapes/aesthetic.yaml", 6
REWARD = "rewards=[{kind: function, function: tests.slurm.slow:score}]"
SETTINGS = (f"epochs={EPOCHS}", REWARD)


class Jobs:
    """sbatch and scontrol on a cluster, with every job's output and logs in `folder`."""

    def __init__(self, environment: dict[str, str], folder: Path):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = environment | {"PATH": path, "LOGS": str(folder), "CUDA_VISIBLE_DEVICES": ""}
        self.environment["OMP_WAIT_POLICY"] = "PASSIVE"  # several jobs share the cores here
        self.folder = folder

    def submit(self, *arguments: str) -> str:
        """The number of the job that `sbatch ARGUMENTS` starts."""
        where = f"--output={self.folder}/%j.out"
        command = ["sbatch", "--parsable", where, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, check=True)
        return done.stdout.strip()

    def run(self, tasks: int, *options: str, given: list[str]) -> str:
        """The number of the job that runs the batch script, without GPUs."""
        size = (f"--ntasks-per-node={tasks}", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
        return self.submit(*size, *options, SCRIPT, RECIPE, *given)

    def show(self, job: str, key: str) -> str:
        told = ask("scontrol", "show", "job", job, environment=self.environment)
        return "".join(re.findall(rf"\b{key}=(\S+)", told)[:1])

    def wait(self, job: str, state: str, seconds: float) -> None:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        wait_for(lambda: self.show(job, "JobState") in ended, seconds, lambda: self.told(job))
        assert self.show(job, "JobState") == state, self.told(job)

    def told(self, job: str) -> str:
        """The queue, the job, and what it has written."""
        asked = (("squeue",), ("scontrol", "show", "job", job))
        texts = [ask(*command, environment=self.environment) for command in asked]
        paths = (self.folder / f"{job}.out", *sorted((self.folder / job).glob("attempt-*/*.log")))
        return "\n".join([*texts, *(f"{path}:\n{path.read_text()[-1500:]}" for path in paths if path.exists())])


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    with cluster(processors=8) as environment:
        yield Jobs(environment, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def submitted(jobs, overrides, tmp_path_factory):
    """The folder of all runs, the numbers of their jobs by name, and the run that needed no scheduler."""
    folder = tmp_path_factory.mktemp("runs")
    # It comes 110 to 140 seconds after the start, as SLURM looks twice a minute. Slow cores import for one minute.
    limits = ("--time=4", "--signal=USR1@100")
    names = {"stopped": jobs.run(2, *limits, given=overrides(folder / "stopped", *SETTINGS))}
    # The rest runs while that job waits for its signal.
    wait_for((folder / "stopped/metrics.jsonl").exists, 240, lambda: jobs.told(names["stopped"]))
    names["after"] = jobs.submit(f"--dependency=afterok:{names['stopped']}", "--wrap", f"ls {folder}/stopped")
    names["typo"] = jobs.run(1, given=overrides(folder / "typo", "epoch=1"))
    names["first"] = jobs.submit("--wrap", "sleep 1")
    after = ("--array=0-1", f"--dependency=afterok:{names['first']}")
    names["seeds"] = jobs.run(1, *after, given=overrides(folder / "seeds", "epochs=2", REWARD))
    names["last"] = jobs.submit(f"--dependency=afterok:{names['seeds']}", "--wrap", f"ls {folder}/seeds-seed*")
    log = jobs.folder / f"{names['seeds']}_1/attempt-0/rank-0.log"
    wait_for(lambda: log.exists() and "epoch 0/2" in log.read_text(), 240, lambda: jobs.told(names["seeds"]))
    ask("scancel", "--signal=USR1", f"{names['seeds']}_1", environment=jobs.environment)
    output = jobs.folder / f"{names['stopped']}.out"
    wait_for(lambda: "requeued" in output.read_text(), 240, lambda: jobs.told(names["stopped"]))
    # On slow cores another three minutes might not be enough, and there would be a second stop.
    ask("scontrol", "update", f"JobId={names['stopped']}", "TimeLimit=10", environment=jobs.environment)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launcher, "launch/nft.py", RECIPE, *overrides(folder / "straight", *SETTINGS)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        timeout=300,
        check=True,
    )
    return folder, names


def test_a_job_is_stopped_before_its_time_is_over_and_goes_on_bit_for_bit_when_requeued(jobs, submitted, digests, rows):
    folder, names = submitted
    job = names["stopped"]
    jobs.wait(job, "COMPLETED", 400)
    restarts = int(jobs.show(job, "Restarts"))
    assert restarts >= 1 and jobs.show(job, "ExitCode") == "0:0"
    output = (jobs.folder / f"{job}.out").read_text()
    assert re.search(rf"stopped by a signal after epoch \d+ of {EPOCHS}: requeued", output), output
    assert output.splitlines()[-1].startswith("done:")
    logs = sorted(str(path.relative_to(jobs.folder / job)) for path in (jobs.folder / job).glob("*/*.log"))
    assert logs == [f"attempt-{attempt}/rank-{rank}.log" for attempt in range(restarts + 1) for rank in (0, 1)]
    assert "resumed from" in (jobs.folder / job / "attempt-1/rank-0.log").read_text()
    jobs.wait(names["after"], "COMPLETED", 30)
    assert "lora.safetensors" in (jobs.folder / f"{names['after']}.out").read_text()
    assert digests(folder / "stopped", EPOCHS) == digests(folder / "straight", EPOCHS)
    assert rows(folder / "stopped") == rows(folder / "straight")


def test_a_dependent_array_trains_one_run_a_seed_of_which_only_the_stopped_one_is_requeued(jobs, submitted):
    folder, names = submitted
    array = names["seeds"]
    jobs.wait(names["last"], "COMPLETED", 400)  # it depends on the whole array
    assert (jobs.folder / f"{names['last']}.out").read_text().count("lora.safetensors") == 2
    attempts = [sorted(p.name for p in (jobs.folder / f"{array}_{seed}").glob("attempt-*")) for seed in (0, 1)]
    assert attempts == [["attempt-0"], ["attempt-0", "attempt-1"]]
    for seed in (0, 1):
        assert f"seed: {seed}\n" in (folder / f"seeds-seed{seed}/recipe.yaml").read_text()


def test_a_typo_fails_the_job_and_requeues_nothing(jobs, submitted):
    folder, names = submitted
    jobs.wait(names["typo"], "FAILED", 60)
    assert jobs.show(names["typo"], "ExitCode") == "2:0" and jobs.show(names["typo"], "Restarts") == "0"
    output = (jobs.folder / f"{names['typo']}.out").read_text()
    assert "error: unknown recipe key epoch: did you mean 'epochs'?" in output and not (folder / "typo").exists()
