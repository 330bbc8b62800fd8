"""The benchmark of a training recipe: what it counts. No time is asserted."""

import json
import subprocess
import sys
from functools import partialmethod

import pytest
import torch
from diffusers import SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from nft.config import load_recipe
from nft.cost.benchmark import encode_cost, measure
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import SD3, architecture_of
from stitchvm_reward.measure import flop_counter
from stitchvm_reward.stitching.value_model import ValueNetwork

CPU = torch.device("cpu")
SMALL = ("rollout.micro_batch=2", "lora.rank=4", "model.text_length=5")


def by_phase(recipe: str, *more: str) -> dict[str, dict]:
    found = measure(load_recipe(recipe, [*SMALL, *more]), 1, CPU)
    assert found["images_per_second"] > 0 and found["peak_teraflops"] > 0
    return {row["phase"]: row for row in found["rows"]}


def test_every_phase_of_full_rollouts_is_counted():
    rows = by_phase("recipes/shapes/aesthetic.yaml")
    assert {name: row["calls"] for name, row in rows.items()} == {
        "encode a prompt": 0,
        "rollout step": 10,
        "decode": 1,
        "score an image: aesthetic": 1,
        "stitched score: aesthetic": 0,
        "training level": 1,
        "optimizer step": 1 / 64,
    }
    assert all(row["milliseconds"] > 0 for row in rows.values())
    # backward costs more than another forward; frozen weights need no gradient of their own
    assert 1.9 < rows["training level"]["gigaflop"] / rows["rollout step"]["gigaflop"] < 3.1


def test_stopped_rollouts_decode_nothing_and_take_the_steps_of_their_window():
    rows = by_phase("recipes/shapes/stopped.yaml")
    assert rows["rollout step"]["calls"] == 5 and rows["stitched score: aesthetic"]["calls"] == 1
    assert rows["decode"]["calls"] == rows["score an image: aesthetic"]["calls"] == 0


@pytest.mark.slow
def test_forwards_that_a_recipe_does_without_are_not_run():
    published = by_phase("recipes/shapes/published_single.yaml")
    lean = by_phase("recipes/shapes/published_single.yaml", "train.beta_kl=0", "train.old_schedule=0")
    forward = lean["rollout step"]["gigaflop"]
    # without the forwards of the old policy and of the base model, which has no adapters
    old = published["training level"]["gigaflop"] - lean["training level"]["gigaflop"]
    assert old == pytest.approx(forward, rel=0.01)
    assert published["reference"]["gigaflop"] == pytest.approx(forward, rel=0.1)
    assert published["reference"]["calls"] == 9 and "reference" not in lean


@pytest.mark.slow
def test_what_a_recipe_compiles_is_measured_compiled(monkeypatch):
    monkeypatch.setattr(Generator, "compile_blocks", partialmethod(Generator.compile_blocks, backend="eager"))
    monkeypatch.setattr(ValueNetwork, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    rows = by_phase("recipes/shapes/stopped.yaml", "model.compile=true")
    blocks = 6
    assert {name: row["compiled_regions"] for name, row in rows.items() if "compiled_regions" in row} == {
        "rollout step": blocks,
        "stitched score: aesthetic": 4 + 1,  # the backbone's blocks and the network behind them
        "training level": blocks,
    }
    eager = by_phase("recipes/shapes/stopped.yaml")
    assert rows["training level"]["gigaflop"] == pytest.approx(eager["training level"]["gigaflop"], rel=0.01)
    torch._dynamo.reset()


def test_attention_on_a_cpu_is_counted_as_elsewhere():
    def count(device: str) -> int:
        counter = flop_counter()
        with torch.device(device), counter:
            query = torch.zeros(1, 2, 64, 16, requires_grad=True)
            torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
        return counter.get_total_flops()

    forward = 2 * 2 * 2 * 64 * 64 * 16
    assert count("cpu") == pytest.approx(3.5 * forward)


def test_published_text_encoders_have_their_published_sizes():
    architecture = architecture_of("stabilityai/stable-diffusion-3.5-large")
    first, second, third = architecture.text_encoders
    with torch.device("meta"):
        made = [
            CLIPTextModelWithProjection(CLIPTextConfig(**first)),
            CLIPTextModelWithProjection(CLIPTextConfig(**second)),
            T5EncoderModel(T5Config(**third)),
        ]
        counts = [sum(p.numel() for p in model.parameters()) for model in made]
        counter = flop_counter()
        with counter, torch.no_grad():
            made[2](torch.zeros(1, 256, dtype=torch.long))
    assert counts == [123_650_304, 694_659_840, 4_762_310_656] and sum(counts) == architecture.text_parameters
    assert counter.get_total_flops() / 1e12 == pytest.approx(2.40, rel=0.02)


def test_both_published_sd3_transformers_are_known():
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in SD3Transformer2DModel.from_config(model.transformer).parameters())
            for name, model in SD3.published.items()
        }
    assert sizes == {
        "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
        "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
    }


def test_an_unknown_model_is_refused():
    with pytest.raises(InputError, match="somebody/model is neither a local folder nor"):
        encode_cost(load_recipe("recipes/aesthetic_pixel.yaml", ["model.path=somebody/model"]), CPU, 1)


@pytest.mark.slow
def test_the_command_writes_what_it_printed(tmp_path):
    command = [sys.executable, "launch/benchmark.py", "recipes/shapes/stopped.yaml", *SMALL]
    done = subprocess.run(
        [*command, "--repeats", "1", "--out", str(tmp_path / "found.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "images per second per process" in done.stdout and "training level" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"device", "torch", "commit", "recipe", "rows", "images_per_second"} <= found.keys()
