"""An epoch at real shapes: two of the recipes. The others are run by hand; BENCHMARKS.md has their table."""

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
    "recipes/aesthetic_24gb.yaml": {"encode", "evaluate", "rollout", "score", "train", "optimizer", "audit"},
    "recipes/draft_pixel.yaml": {"encode", "evaluate", "rollout", "train", "optimizer"},
}


@pytest.mark.parametrize("recipe", PHASES)
def test_the_plan_is_within_ten_percent_of_what_is_tracked(recipe, tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.fake_cuda", recipe, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert out.is_file(), done.stderr
    result = json.loads(out.read_text())["recipes"][0]
    assert result["fault"] is None
    assert result["plan"].keys() == PHASES[recipe] <= result["peaks"].keys()
    for phase, planned in result["plan"].items():
        assert planned == pytest.approx(result["peaks"][phase], rel=0.1), phase
