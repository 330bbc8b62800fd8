"""The plan of a run, at full size on the meta device."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from nft.config import load_recipe
from nft.cost import shapes
from nft.cost.memory import most_audited
from nft.cost.plan import cost_lines, recipe_geometry, work, work_lines
from nft.cost.shapes import costs
from stitchvm_reward.families import SD3, architecture_of
from stitchvm_reward.measure import flops


@pytest.mark.parametrize(
    ("model", "teraflop"),
    [
        ("openai/clip-vit-large-patch14-336", 0.38),
        ("apple/DFN5B-CLIP-ViT-H-14-378", 1.01),
        ("adams-story/HPSv2-hf", 0.33),
    ],
)
def test_a_published_reward_tower_costs_what_was_worked_out_by_hand(model, teraflop):
    with torch.device("meta"), torch.no_grad():
        assert shapes._clip_flops(model) / 1e12 == pytest.approx(teraflop, rel=0.02)
        assert shapes._clip_flops("somebody/clip") is None


@pytest.fixture(scope="module")
def medium():
    recipe = load_recipe("recipes/aesthetic_published.yaml")
    return recipe, costs(recipe)


def test_sd35_medium_has_its_published_size(medium):
    _, found = medium
    assert found.base_parameters == 2_243_171_520
    assert (found.adapted_layers, found.adapter_parameters) == (191, 18_776_064)


@pytest.mark.parametrize(
    ("field", "teraflop"), [("forward_flops", 2.44), ("training_flops", 5.26), ("decode_flops", 2.51)]
)
def test_costs_of_one_sample_are_those_worked_out_by_hand(medium, field, teraflop):
    _, found = medium
    assert getattr(found, field) / 1e12 == pytest.approx(teraflop, rel=0.02)


@pytest.fixture(scope="module")
def larger():
    """Larger pictures, and adapters on more layers, which a forward pass without adapters does not feel."""
    targets = [*SD3.lora_targets, *(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))]
    overrides = [f"lora.targets=[{','.join(targets)}]", "model.resolution=1024"]
    return costs(load_recipe("recipes/aesthetic_published.yaml", overrides))


@pytest.mark.slow
def test_attn2_adds_layers_only_to_the_first_blocks(larger):
    assert larger.adapted_layers == 191 + 4 * 13 == 243
    assert larger.adapter_parameters == 18_776_064 + 4 * 13 * 2 * 32 * 1536


@pytest.mark.slow
def test_1024_pixels_cost_what_was_worked_out_by_hand(larger):
    found = larger
    assert found.forward_flops / 1e12 == pytest.approx(11.25, rel=0.02)
    assert found.decode_flops / 1e12 == pytest.approx(10.5, rel=0.02)


def test_encoding_an_image_costs_what_was_worked_out_by_hand():
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL.from_config(architecture_of("stabilityai/stable-diffusion-3.5-medium").vae)
        found = flops(lambda: vae.encode(torch.zeros(1, 3, 512, 512)))
    assert found / 1e12 == pytest.approx(1.12, rel=0.02)


def test_a_tower_that_several_rewards_share_is_measured_once_and_counted_for_each(monkeypatch):
    measured, measure = [], shapes._clip_flops
    monkeypatch.setattr(shapes, "_known", {})
    monkeypatch.setattr(shapes, "_clip_flops", lambda model: measured.append(model) or measure(model))
    one = costs(load_recipe("recipes/shapes/clip.yaml"))
    model = load_recipe("recipes/shapes/clip.yaml").rewards[0].model
    both = f"rewards=[{{kind: clip, model: {model}}}, {{kind: hpsv2, model: {model}}}]"
    two = costs(load_recipe("recipes/shapes/clip.yaml", [both]))
    assert measured == [model] * 2
    assert two.pixel_score_flops == 2 * one.pixel_score_flops and two.score_flops == 2 * one.score_flops


def test_work_counts_every_network_call(medium):
    recipe, found = medium
    phases = work(recipe, recipe_geometry(recipe, 1), found)
    forward, training = found.forward_flops / 1e12, found.training_flops / 1e12
    assert phases["rollout"] == pytest.approx(1152 * 10 * forward)
    # the current policy with gradient, the old one and the reference without
    assert phases["train"] == pytest.approx(1152 * 9 * (training + 2 * forward))
    shared = replace(recipe, train=replace(recipe.train, reference_share=0.125))
    phases = work(shared, recipe_geometry(shared, 1), found)
    assert phases["train"] == pytest.approx(1152 * 9 * (training + 1.125 * forward))


def test_a_stopped_run_counts_the_steps_it_takes_and_decodes_nothing(medium):
    _, found = medium
    recipe = load_recipe("recipes/aesthetic.yaml")
    phases = work(recipe, recipe_geometry(recipe, 1), found)
    assert phases["rollout"] == pytest.approx(192 * 5 * found.forward_flops / 1e12) and phases["decode"] == 0
    # every tenth epoch 32 samples go the rest of the way
    whole = 5 * found.forward_flops + found.decode_flops + found.pixel_score_flops
    assert phases["audit"] == pytest.approx(3.2 * whole / 1e12)
    assert "stopped after 4 to 6" in "\n".join(work_lines(recipe, 1))


def test_the_plan_of_a_local_folder_needs_no_hub_and_names_uneven_shares():
    recipe = load_recipe("recipes/shapes/aesthetic.yaml", ["rollout.micro_batch=16"])
    text = "\n".join([*work_lines(recipe, 3), *cost_lines(recipe, 3)])
    assert "1 to 2 micro batches each" in text
    assert "miniature/weights/sd3" in text and "GiB" in text


def test_an_audit_takes_part_of_a_micro_batch_to_the_image():
    def most(*more: str) -> int:
        return most_audited(load_recipe("recipes/aesthetic.yaml", list(more)))

    assert 1 < most() < 8  # 32 of 192 samples
    assert (most("audit.samples=192"), most("audit.samples=192", "train.micro_batch=4")) == (8, 4)
    assert most("audit.every=0") == 0
