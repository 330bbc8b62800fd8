"""Stable Diffusion 3.5 Medium with CLIP ViT-L/14 at 336 px on the meta device: shapes fit, costs are as worked out."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.families import SD3, architecture_of
from stitchvm_reward.rewards.architectures import clip_configuration
from stitchvm_reward.rewards.tail import RewardTail
from stitchvm_reward.stitching.value_model import ValueNetwork

MODEL = "stabilityai/stable-diffusion-3.5-medium"


def teraflop(call) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 1e12


@pytest.fixture(scope="module")
def head() -> BackboneHead:
    with torch.device("meta"):
        return BackboneHead(SD3, SD3.transformer.from_config(architecture_of(MODEL).transformer))


@pytest.fixture(scope="module")
def given():
    with torch.device("meta"):
        conditions = SD3.stand_in(architecture_of(MODEL), 1, SD3.text_length)
        return torch.zeros(1, 16, 64, 64), torch.zeros(1), conditions


@pytest.mark.parametrize(("blocks", "expected"), [(1, 0.118), (2, 0.232), (4, 0.460), (8, 0.916)])
def test_the_first_blocks_cost_what_was_worked_out_by_hand(head, given, blocks, expected):
    assert teraflop(lambda: head.features(*given, [blocks])) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_a_stitched_score_fits_and_costs_a_sixth_of_a_tweedie_score(head, given):
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**clip_configuration("openai/clip-vit-large-patch14-336")))
        network = ValueNetwork(head.width(4, 16), RewardTail(clip, 1))
    found = {}

    def score():
        found["states"], found["embedding"] = network(head.features(*given, [4])[4])

    cost = teraflop(score)
    assert found["states"].shape == (1, 577, 1024) and found["embedding"].shape == (1, 768)
    assert cost == pytest.approx(0.83, rel=0.03)
    assert cost < (2.44 + 2.51 + 0.38) / 6
