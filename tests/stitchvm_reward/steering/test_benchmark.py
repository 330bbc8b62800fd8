"""What a steered step costs at a model's shapes."""

import pytest
import torch
from torch import nn

from stitchvm_reward.measure import peak_mib
from stitchvm_reward.steering.benchmark import guided_step_costs
from stitchvm_reward.stitching.config import load_stitch_recipe

RECIPE = "recipes/stitch/shapes_aesthetic.yaml"
CPU = torch.device("cpu")


def by_method(rows):
    return {row["method"]: row for row in rows}


@pytest.mark.slow
def test_flops_and_memory_are_the_same_counted_and_computed():
    recipe = load_stitch_recipe(RECIPE, ["backbone.block=4", "reward.block=1"])
    computed, counted = (by_method(guided_step_costs(recipe, 2.0, 1, CPU, shapes)) for shapes in (False, True))
    for name, row in computed.items():
        assert row["milliseconds"] > 0 and counted[name]["milliseconds"] is None
        assert row["gigaflop"] > 0 and abs(row["gigaflop"] / counted[name]["gigaflop"] - 1) < 0.02, name
    guided, stitched = counted["DPS"], counted["DPS + StitchVM"]
    assert stitched["gigaflop"] < guided["gigaflop"] / 2 and stitched["peak_mib"] < guided["peak_mib"] / 2
    # Sharing: a stitched value on the way costs a step its blocks' way on and the reward's tail, not its blocks again.
    added = counted["step with a stitched value"]["gigaflop"] - counted["step"]["gigaflop"]
    assert 0 < added < 0.2 < counted["step with Tweedie's value"]["gigaflop"] - counted["step"]["gigaflop"]


def test_peak_memory_counts_what_lives_at_once_and_no_views():
    network = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)])
    given = torch.randn(256, 1024)  # 1 MiB, as every layer's output

    def ahead():
        with torch.no_grad():
            network(given).view(-1)

    def back():
        network(given).sum().backward()
        network.zero_grad(set_to_none=True)

    assert 1.9 < peak_mib(ahead, CPU) < 2.1  # a layer's input and its output
    assert 16 < peak_mib(back, CPU) < 22  # gradients of 4 MiB each, and some activations


@pytest.mark.slow
def test_the_command_tells_steps_and_refuses_what_does_not_go_together(launched, tmp_path):
    code, out, error = launched("benchmark", RECIPE, "--steering", "--shapes-only", "--out", tmp_path / "found.json")
    assert code == 0 and "DPS + StitchVM" in out and (tmp_path / "found.json").exists(), error
    for arguments, told in (
        ((RECIPE, "--shapes-only"), "--shapes-only needs --steering"),
        (("recipes/shapes/aesthetic.yaml", "--steering"), "--steering needs a stitching recipe, got recipes/shapes"),
    ):
        code, _, error = launched("benchmark", *arguments)
        assert code == 2 and told in error and len(error.splitlines()) == 1
