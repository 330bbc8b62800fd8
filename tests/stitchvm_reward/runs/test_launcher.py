"""An accelerator that sees other processes than the launcher started is refused."""

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.launcher import make_accelerator


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
