"""The command for a GPU, on a CPU: it runs whole at the miniature's shapes, resumes, and says what is missing."""

import json
import os
import subprocess
import sys

import pytest

import tests.gpu.__main__ as gpu
from tests.gpu import packages
from tests.tiny import ROOT

# The rest (resume, compile, options, benchmark) starts many processes and repeats what other tests check.
IN_THE_SUITE = ("cpu_cuda", "model", "stitch", "train", "steer", "export")


@pytest.mark.slow
def test_the_steps_pass_on_a_cpu_and_name_what_only_a_gpu_can_do(tmp_path):
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--work", str(tmp_path), "--out", str(out), "--steps", *IN_THE_SUITE],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    found = json.loads(out.read_text())
    failed = {name: step for name, step in found["steps"].items() if not step["passed"]}
    assert done.returncode == 0 and found["passed"] and not failed, failed
    assert list(found["steps"]) == list(IN_THE_SUITE) and {"device", "commit", "torch"} <= found.keys()
    skipped = {name for step in found["steps"].values() for name in step["skipped"]}
    assert {"rollouts and gradients on the GPU", "peak memory against the plan"} <= skipped


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Run the command with steps that only count how often they ran; those named in `bad` fail."""
    ran, bad = [], set()

    def run(name, work, limit):
        ran.append(name)
        return {"passed": name not in bad, "seconds": 1.0, "checks": {"holds": name not in bad}, "skipped": {}}

    def start(*arguments, commit="abc1234"):
        monkeypatch.setattr("stitchvm_reward.measure._commit", lambda: commit)
        monkeypatch.setattr(
            sys, "argv", ["gpu", "--work", str(tmp_path), "--out", str(tmp_path / "r.json"), *arguments]
        )
        ran.clear()
        return gpu.main(), list(ran)

    monkeypatch.setattr(gpu, "run_step", run)
    start.bad = bad
    return start


def test_a_step_that_passed_is_repeated_only_for_other_code_or_when_asked(steps):
    steps.bad.add("stitch")
    assert steps("--steps", "model", "stitch") == (1, ["model", "stitch"])
    steps.bad.clear()
    assert steps("--steps", "model", "stitch") == (0, ["stitch"])  # what failed runs again
    assert steps("--steps", "model", "--redo") == (0, ["model"])
    assert steps("--steps", "model", commit="def5678") == (0, ["model"])
    assert steps("--steps", "model", commit="def5678-dirty") == (0, ["model"])
    assert steps("--steps", "model", commit="def5678-dirty") == (0, ["model"])


def test_a_step_that_takes_too_long_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", "/bin/sleep")  # refuses its arguments at once
    assert "ended with exit code" in gpu.run_step("model", tmp_path, 60)["reason"]
    (tmp_path / "slow").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "slow").chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(tmp_path / "slow"))
    found = gpu.run_step("model", tmp_path, 0.2)
    assert not found["passed"] and found["reason"] == "took longer than 0.2 s"


def test_missing_packages_are_told_before_anything_is_imported(monkeypatch, capsys):
    monkeypatch.setattr(packages, "NEEDED", ("torch", "no_such_diffusers"))
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    told = capsys.readouterr().err
    assert told.startswith("error: no_such_diffusers not installed: run pip install") and len(told.splitlines()) == 1
