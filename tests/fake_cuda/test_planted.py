"""Each class of fault has a planted example, which is found where it lies in an inner loop, and nowhere else."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.fake_cuda import planted
from tests.tiny import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in device needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-m", "tests.fake_cuda.planted"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("plant", [plant.__name__ for plant in planted.IMPOSSIBLE])
def test_what_cannot_run_is_refused(found, plant):
    refused, *_ = found[plant]
    told = {"mixed_devices": "two devices, cuda:0 and cpu", "mixed_formats_in_a_convolution": "should be the same"}
    assert told.get(plant, "of different number formats") in refused


@pytest.mark.parametrize("plant", [plant.__name__ for plant in planted.SYNCHRONISED])
def test_a_synchronisation_is_found_in_an_inner_loop_with_its_line_and_served_outside_of_one(found, plant):
    refused, syncs, products, outside = found[plant]
    assert (refused, products, outside) == ("", [], False)
    assert len(syncs) == 1 and syncs[0].startswith("inner: ") and "at tests/fake_cuda/planted.py:" in syncs[0]


@pytest.mark.parametrize("plant", [plant.__name__ for plant in planted.PRODUCTS])
def test_a_float32_product_is_found_in_an_inner_loop(found, plant):
    refused, syncs, products, outside = found[plant]
    assert (refused, syncs, outside) == ("", [], False) and products


def test_the_backward_pass_is_looked_through_too(found):
    assert any("a backward pass" in line for line in found["float32_backward"][2])


def test_harmless_code_and_what_is_meant_to_be_float32_are_let_pass(found):
    assert found["nothing_to_wait_for"] == ["", [], [], False]
    assert found["meant"] == {}


def test_peaks_are_those_worked_out_by_hand(found):
    # The last one holds the leaf, the results of both exponentials and a gradient, and then two gradients and the
    # first exponential's result: 4 MiB, and a sum of a block.
    assert found["peaks"] == {
        "one_after_the_other": 2,
        "views": 2,
        "chain": 2,
        "saved_for_the_backward_pass": pytest.approx(4, abs=0.01),
    }
