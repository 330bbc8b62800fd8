"""An epoch at real shapes of two recipes. The others are run by command; BENCHMARKS.md has the table."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.tiny import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in device needs a C++ compiler"),
]
PHASES = {
    "draft_pixel": {"encode", "evaluate", "rollout", "train", "optimizer"},
    "aesthetic_24gb": {"encode", "evaluate", "rollout", "score", "audit", "train", "optimizer"},
}
OPTIONS = {"aesthetic_24gb": ["--memory", "24"]}


@pytest.mark.parametrize("name", [pytest.param("draft_pixel", marks=pytest.mark.exhaustive), "aesthetic_24gb"])
def test_an_epoch_waits_for_nothing_multiplies_in_bfloat16_and_needs_what_the_plan_says(name, tmp_path):
    out = tmp_path / "found.json"
    options = ["--out", str(out), *OPTIONS.get(name, [])]
    command = [sys.executable, "-m", "tests.fake_cuda", f"recipes/{name}.yaml", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert out.is_file(), done.stderr
    (result,) = json.loads(out.read_text())["recipes"]
    assert result["fault"] is None
    assert (result["synchronisations"], result["float32_products"]) == ({}, {})
    assert result["plan"].keys() == PHASES[name] <= result["peaks"].keys()
    for phase, planned in result["plan"].items():
        assert planned == pytest.approx(result["peaks"][phase], rel=0.1), phase
    assert done.returncode == 0
