"""Processes that would start from different weights, or from different checkpoints, refuse to start."""

import pytest

from tests.distributed.launching import start

pytestmark = pytest.mark.slow

SCRIPT = """
import sys

from nft.backend import Backend
from nft.optimization import OptimizationSettings
from nft.policy import Policy
from stitchvm_reward.command import run_command
from stitchvm_reward.runs.launcher import make_accelerator, shutdown
from tests.nft.test_policy import TARGETS, make_network

accelerator = make_accelerator()
network, second = make_network(), accelerator.process_index == 1
backend = Backend(accelerator, Policy(network, 4, 8, TARGETS, seed=0), OptimizationSettings())
codes = []
for weight, step in ((0.0, 0), (1e-6 * second, 0), (0.0, int(second))):
    network.proj_out.weight.data[0, 0] += weight
    codes.append(run_command(lambda step=step: backend.require_same_weights(step)))
    network.proj_out.weight.data.copy_(make_network().proj_out.weight)
shutdown(accelerator)
sys.exit(codes != [0, 2, 2])
"""


def test_processes_that_differ_in_one_weight_or_in_their_step_say_so(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = start("ddp", 2, tmp_path / "script.py", tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    told = [line for line in done.stderr.splitlines() if "do not start alike" in line]
    assert len(told) == 2 and "proj_out.weight and 0 more differ" in told[0], done.stderr[-4000:]
    assert "the optimizer step and 0 more differ" in told[1]
