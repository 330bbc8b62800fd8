"""An accelerator that sees other processes than the launcher started is refused; threads are the user's choice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.launcher import LAUNCHED, make_accelerator, threads_chosen, threads_line


def test_more_processes_asked_for_than_started_is_refused_in_one_line(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_NUM_PROCESSES", "2")
    with pytest.raises(InputError, match="torchrun --nproc-per-node") as refused:
        make_accelerator()
    message = str(refused.value)
    assert "\n" not in message
    assert "2" in message, f"does not say how many were asked for: {message}"


def test_accelerate_launch_that_starts_one_process_in_place_of_two_is_refused(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` runs one process; this is the environment that it gives it."""
    arguments = launch_command_parser().parse_args(["--cpu", "--num_processes", "2", "launch/nft.py"])
    arguments, *_ = _validate_launch_command(arguments)
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="several processes were requested but accelerate sees 1; "):
        make_accelerator()


def test_a_lone_process_is_accepted(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert make_accelerator().num_processes == 1


def test_a_launch_that_asks_for_deepspeed_without_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"DeepSpeed, which is not installed: DS_BUILD_OPS=0 pip install"):
        make_accelerator()


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [({}, False), ({"OMP_NUM_THREADS": "1"}, True), ({"OMP_NUM_THREADS": "3", LAUNCHED: "no"}, True)],
)
def test_threads_are_the_users_choice_where_only_the_user_can_have_set_them(monkeypatch, environment, chosen):
    for name in ("OMP_NUM_THREADS", LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert threads_chosen() == chosen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "options", "chosen"),
    [
        (None, (), False),
        ("1", (), True),
        (None, ("--num_cpu_threads_per_process", "1"), True),
        (None, ("--num-cpu-threads-per-process=1",), True),
    ],
)
def test_a_process_of_accelerates_launcher_takes_all_cores_unless_the_user_set_threads(
    tmp_path, variable, options, chosen
):
    script = tmp_path / "threads.py"
    script.write_text(
        "import torch\n"
        "from stitchvm_reward.runs.launcher import make_accelerator, threads_chosen\n"
        "make_accelerator()\n"
        "print(threads_chosen(), torch.get_num_threads())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    environment.pop("OMP_NUM_THREADS", None)
    if variable:
        environment["OMP_NUM_THREADS"] = variable
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    cores = len(os.sched_getaffinity(0))
    assert done.stdout.split()[-2:] == [str(chosen), str(1 if chosen else cores)], done.stderr


@pytest.mark.parametrize(("given", "spins"), [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_every_command_says_how_threads_wait_before_torch_is_loaded(given, spins):
    """libgomp reads the variable when it is loaded, with torch."""
    names = sorted(path.as_posix() for path in Path("launch").glob("*.py"))
    assert "launch/nft.py" in names
    program = (
        "import os, runpy, sys\n"
        "for name in sys.argv[1:]:\n"
        "    os.environ.pop('GOMP_SPINCOUNT', None)\n"
        "    sys.modules.pop('stitchvm_reward.command', None)\n"
        "    runpy.run_path(name)\n"
        "    print(name, os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)\n"
    )
    environment = {name: text for name, text in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", program, *names],
        capture_output=True,
        text=True,
        env=environment | given | {"PYTHONPATH": str(Path.cwd())},
    )
    assert done.stdout.splitlines() == [f"{name} {spins} False" for name in names], done.stderr


def test_the_plan_tells_how_many_threads_run_and_how_they_wait(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    line = threads_line()
    assert line.startswith(f"threads      {torch.get_num_threads()} per process on ") and "GOMP_SPINCOUNT 1000" in line
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert "OMP_WAIT_POLICY passive" in threads_line()
