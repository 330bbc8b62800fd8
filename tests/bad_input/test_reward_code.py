"""A user's reward that ends, interrupts or hangs the run is told by its name, and never passes for success."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards import FunctionReward
from stitchvm_reward.rewards.custom import find_function, load_custom
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.runs import rank_sync
from stitchvm_reward.runs.rank_sync import watchdog
from stitchvm_reward.runs.tracking import Timings
from stitchvm_reward.users_code import running
from tests.tiny import RECIPE

SCORES = """
import asyncio, sys, torch
def leaves(images, prompts): sys.exit()
def leaves_well(images, prompts): sys.exit(0)
def interrupts(images, prompts): raise KeyboardInterrupt
def cancels(images, prompts): raise asyncio.CancelledError("late")
def complex(images, prompts): return torch.zeros(len(prompts), dtype=torch.complex64)
class Leaves:
    def __init__(self): sys.exit(0)
    def score(self, images, prompts): return torch.zeros(len(prompts))
"""
PROMPTS = ["one", "two"]


@pytest.fixture
def users(tmp_path, monkeypatch):
    modules = {
        "bad_scores": SCORES,
        "bad_exit": "import sys; sys.exit(0)",
        "bad_interrupt": "raise KeyboardInterrupt",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # commands set the first one


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("leaves", "raised SystemExit:"),
        ("leaves_well", "raised SystemExit: 0"),
        ("interrupts", "raised KeyboardInterrupt:"),
        ("cancels", "raised CancelledError: late"),
        ("complex", "must return real numbers, got torch.complex64"),
    ],
)
def test_a_score_that_is_none(users, function, told):
    with pytest.raises(InputError, match=f"bad_scores:{function} {told}"):
        FunctionReward(f"bad_scores:{function}").score(torch.rand(2, 3, 4, 4), PROMPTS)
    assert running() is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("module", ["bad_exit", "bad_interrupt"])
def test_a_module_that_ends_at_import(users, refused, module):
    with pytest.raises(InputError, match=rf"cannot import {module}:score \(is it on PYTHONPATH\?\): "):
        find_function(f"{module}:score")
    line = refused("nft", RECIPE, f"rewards=[{{kind: '{module}:score'}}]")
    assert f"cannot import {module}:score" in line and "ModuleNotFound" not in line


def test_a_class_that_ends_when_it_is_constructed(users):
    with pytest.raises(InputError, match="bad_scores:Leaves cannot be constructed: SystemExit: 0"):
        load_custom(RewardRecipe(kind="bad_scores:Leaves"), torch.device("cpu"))


def test_ctrl_c_during_a_score_is_still_ctrl_c():
    def pressed(images, prompts):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(5)

    with pytest.raises(KeyboardInterrupt):
        FunctionReward("my:slow", pressed).score(torch.rand(2, 3, 4, 4), PROMPTS)
    assert running() is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_scores_in_other_threads_leave_signals_alone():
    found = []
    reward = FunctionReward("my:mean", lambda images, prompts: images.mean((1, 2, 3)))
    thread = threading.Thread(target=lambda: found.append(reward.score(torch.ones(2, 3, 4, 4), PROMPTS)))
    thread.start()
    thread.join()
    assert found[0].tolist() == [1.0, 1.0]


def test_a_run_whose_reward_leaves_ends_with_2_and_the_name(users, launched, overrides, tmp_path):
    given = overrides(tmp_path / "run", "rewards=[{kind: 'bad_scores:leaves_well'}]", "epochs=1")
    code, out, error = launched("nft", RECIPE, *given)
    assert code == 2 and "done" not in out
    assert "error: bad_scores:leaves_well raised SystemExit: 0" in error.splitlines()[-1]
    assert not Path(tmp_path / "run" / "lora.safetensors").exists()


def test_the_watchdog_names_a_reward_that_hangs(monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(rank_sync.os, "_exit", lambda code: ended.set())
    timings = Timings()
    reward = FunctionReward("my:slow", lambda images, prompts: ended.wait(30) and torch.zeros(len(prompts)))
    with watchdog(timings, 0.3, 0), timings.phase("score"):
        reward.score(torch.rand(2, 3, 4, 4), PROMPTS)
    assert "in phase score, in my:slow: my:slow hangs, or a step takes longer" in capfd.readouterr().err
