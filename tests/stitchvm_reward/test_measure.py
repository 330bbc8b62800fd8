"""What a measurement times: compiled code where compiled code was asked for. No time is asserted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from stitchvm_reward.measure import compiled_regions, flops, fused_attention, peak_mib, timed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(self.layer(x)) + 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_is_timed_compiled_and_its_operations_are_counted(backend):
    block, x = Block(), torch.randn(2, 8)
    block.compile(backend=backend)
    found = timed(lambda: block(x).sum().backward(), 2, CPU, 3, compiled=True)
    assert found["compiled_regions"] == 1 and found["milliseconds"] > 0
    assert found["gigaflop"] * 1e9 == 2 * 2 * 8 * 8  # forward, and the weights' gradient


@pytest.mark.parametrize("count", [flops, lambda call: peak_mib(call, CPU)])
def test_counting_first_leaves_code_to_be_compiled(count):
    block, x = Block(), torch.randn(2, 8)
    block.compile(backend="eager")
    count(lambda: block(x))
    assert compiled_regions(lambda: block(x)) == 1


def test_uncompiled_code_is_not_timed_as_compiled():
    block, x = Block(), torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="nothing compiled ran"):
        timed(lambda: block(x), 2, CPU, 1, compiled=True)
    assert "compiled_regions" not in timed(lambda: block(x), 2, CPU, 1)


def test_a_timed_call_that_compiles_is_refused():
    block, sizes = Block(), iter([2, 2, 5, 5])
    block.compile(backend="eager", dynamic=False)
    with pytest.raises(RuntimeError, match="1 new graphs in the timed calls"):
        timed(lambda: block(torch.randn(next(sizes), 8)), 1, CPU, 1, compiled=True)


def test_attention_on_the_meta_device_is_fused_where_a_checkpoint_runs_it_again():
    def attend(query):
        return F.scaled_dot_product_attention(query, query, query)

    def both_ways():
        query = torch.zeros(1, 1, 1024, 8, device="meta", requires_grad=True)
        checkpoint(attend, query, use_reentrant=False).sum().backward()

    scores = 4 * 1024**2 / 2**20
    with fused_attention():
        assert peak_mib(both_ways, torch.device("meta")) < 0.2 * scores
    assert peak_mib(both_ways, torch.device("meta")) > scores
