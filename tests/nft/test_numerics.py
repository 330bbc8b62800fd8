"""Deterministic kernels and TF32 are set as the recipe says before CUDA can start, and what they forbid is named."""

import os
from dataclasses import replace

import pytest
import torch

from nft import preflight, reference
from nft.config import load_recipe
from stitchvm_reward.command import run_command
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards.custom import FunctionReward
from stitchvm_reward.runs import launcher, numerics
from stitchvm_reward.runs.numerics import WORKSPACE, set_numerics
from tests.tiny import DRAFT, RECIPE


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Leave torch as it was."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    product, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = product.allow_tf32, convolution.allow_tf32
    yield
    product.allow_tf32, convolution.allow_tf32 = kept
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ.pop(WORKSPACE, None)


@pytest.fixture
def at_the_start(monkeypatch):
    """What is set when a run makes its accelerator, before which nothing may touch CUDA; the run ends there."""
    seen = {}

    def see(*arguments):
        seen["workspace"] = os.environ.get(WORKSPACE)
        seen["deterministic"] = torch.are_deterministic_algorithms_enabled()
        seen["strict"] = not torch.is_deterministic_algorithms_warn_only_enabled()
        seen["benchmark"] = torch.backends.cudnn.benchmark
        seen["tf32"] = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        raise InputError("the accelerator would be made here")

    def started():
        raise AssertionError("CUDA was started before the accelerator was made")

    monkeypatch.setattr(launcher, "make_accelerator", see)
    monkeypatch.setattr(reference, "make_accelerator", see)
    monkeypatch.setattr(torch.cuda, "_lazy_init", started)
    return seen


def test_a_deterministic_run_sets_everything_before_cuda_starts(at_the_start, launched, overrides, tmp_path):
    torch.backends.cudnn.benchmark = True
    code, _, told = launched("nft", RECIPE, *overrides(tmp_path / "run", "model.deterministic=true"))
    assert code == 2 and "the accelerator would be made here" in told
    assert at_the_start == {
        "workspace": ":4096:8",
        "deterministic": True,
        "strict": True,
        "benchmark": False,
        "tf32": (True, True),
    }


@pytest.mark.parametrize("tf32", [True, False])
def test_an_ordinary_run_sets_tf32_as_its_recipe_says(at_the_start, launched, overrides, tmp_path, tf32):
    torch.backends.cuda.matmul.allow_tf32 = not tf32
    torch.backends.cudnn.allow_tf32 = not tf32
    launched("nft", RECIPE, *overrides(tmp_path / "run", f"model.tf32={str(tf32).lower()}"))
    assert at_the_start["tf32"] == (tf32, tf32)
    assert not at_the_start["deterministic"] and at_the_start["workspace"] is None


@pytest.mark.parametrize(("given", "deterministic"), [((), True), (("model.deterministic=false",), False)])
def test_reference_curves_are_deterministic_unless_told_otherwise(
    at_the_start, launched, overrides, tmp_path, given, deterministic
):
    code, _, told = launched("nft", RECIPE, *overrides(tmp_path / "run", *given), "--check")
    assert code == 2 and "the accelerator would be made here" in told
    assert at_the_start["deterministic"] == deterministic


def test_it_is_an_error_to_ask_for_deterministic_kernels_once_cuda_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG in the environment before CUDA starts"):
        set_numerics(deterministic=True, tf32=True)
    monkeypatch.setenv(WORKSPACE, ":16:8")
    set_numerics(deterministic=True, tf32=True)
    assert os.environ[WORKSPACE] == ":16:8"


def scatter(images, prompts):
    """A reward with an operation that has no deterministic kernel, not even on the CPU."""
    return images.flatten(1)[:, 0].put_(torch.tensor([0]), torch.tensor([1.0]))


@pytest.mark.parametrize("inside", ["the loop", "a reward"])
def test_an_operation_without_a_deterministic_kernel_is_named_in_one_line(capfd, inside):
    score = FunctionReward("mine:scatter", scatter).score if inside == "a reward" else scatter
    assert run_command(lambda: int(score(torch.zeros(1, 3, 4, 4), ["a circle"]))) == 1
    set_numerics(deterministic=True, tf32=True)
    assert run_command(lambda: int(score(torch.zeros(1, 3, 4, 4), ["a circle"]))) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "no deterministic kernel for put_" in line and "model.deterministic=false" in line


def test_other_errors_of_torch_keep_their_traceback():
    with pytest.raises(RuntimeError, match="size of tensor a"):
        run_command(lambda: int(torch.zeros(2) + torch.zeros(3)))


def test_a_reward_whose_gradient_has_no_deterministic_kernel_is_refused_before_loading(
    monkeypatch, overrides, tmp_path
):
    recipe = load_recipe(RECIPE, overrides(tmp_path / "run", *DRAFT, "model.deterministic=true"))
    preflight.check_inputs(recipe)  # on a CPU it has one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="aesthetic resizes images by antialiased bicubic") as refused:
        preflight.check_inputs(recipe)
    assert "upsample_bicubic2d_aa_backward_out_cuda" in str(refused.value) and "\n" not in str(refused.value)
    preflight.check_inputs(replace(recipe, model=replace(recipe.model, deterministic=None)))


@pytest.mark.slow
def test_a_deterministic_run_is_the_ordinary_one_on_a_cpu_and_resumes_bit_for_bit(train, digests, tmp_path):
    ordinary, straight, stopped = (tmp_path / name for name in ("ordinary", "straight", "stopped"))
    train(ordinary, "epochs=2")
    numerics.set_numerics(deterministic=True, tf32=True)
    train(straight, "epochs=2")
    train(stopped, "epochs=1")
    train(stopped, "epochs=2")
    assert digests(stopped, 2) == digests(straight, 2) == digests(ordinary, 2)
