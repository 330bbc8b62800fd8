"""Blocks that a value model has run begin the denoiser's next pass."""

from dataclasses import replace

import pytest
import torch

from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.families import SD3
from stitchvm_reward.families.family import join_passes
from stitchvm_reward.measure import flops
from stitchvm_reward.steering.build import encode
from stitchvm_reward.steering.denoiser import Known
from stitchvm_reward.steering.dps import dps
from stitchvm_reward.steering.fk import fk
from stitchvm_reward.steering.sampling import make_denoiser
from stitchvm_reward.steering.settings import FeynmanKac, Guidance, Settings
from stitchvm_reward.steering.values import StitchedValue
from stitchvm_reward.stitching.value_model import StitchedValueModel
from tests.stitchvm_reward.steering.conftest import MODEL, VALUE

PROMPTS = ["a red cross, white background", "two green circles on black"]


@pytest.fixture(scope="module")
def generator(pipeline):
    return Generator.of_pipeline(pipeline, 64)


@pytest.fixture(scope="module")
def stitched(value):
    return StitchedValue({"aesthetic": value}, {"aesthetic": 1.0})


def denoiser_of(generator, pipeline, value, **changes):
    settings = Settings(**({"steps": 4, "guidance": 2.0} | changes))
    return make_denoiser(generator, PROMPTS, *encode(pipeline, PROMPTS, "", 13), value=value, settings=settings)


@pytest.mark.parametrize("blocks", [1, 4, 6])
def test_a_finished_pass_is_the_networks_own(generator, pipeline, blocks):
    conditions, _ = encode(pipeline, PROMPTS, "", 13)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.3])
    with torch.no_grad():
        whole = generator.velocity(latents, sigma, conditions)
        _, stands = BackboneHead(SD3, pipeline.transformer).run(latents, sigma, conditions, [blocks])
        assert torch.equal(stands.finish(), whole)
        parts = [stands.select(torch.tensor([row])) for row in (0, 1)]
        torch.testing.assert_close(join_passes(parts).finish(), whole, atol=1e-5, rtol=1e-5)


def test_a_value_on_null_text_begins_the_unguided_branch_and_nothing_changes(generator, pipeline, stitched):
    denoiser = denoiser_of(generator, pipeline, stitched)
    apart = replace(denoiser, null_text=False)
    assert denoiser.null_text
    latents = denoiser.start(3).latents
    _, known = stitched.measure(denoiser, latents, 1)
    _, nothing = stitched.measure(apart, latents, 1)
    assert set(known.passes) == {"null"} and not nothing.passes
    sigma = denoiser.sigmas[1]
    whole = apart.velocity(latents, sigma, nothing)
    torch.testing.assert_close(denoiser.velocity(latents, sigma, known), whole, atol=1e-5, rtol=1e-5)
    saved = flops(lambda: denoiser.velocity(latents, sigma, Known())) - flops(
        lambda: denoiser.velocity(latents, sigma, known)
    )
    head = flops(lambda: stitched.models["aesthetic"].features(latents, torch.full((6,), sigma)))
    assert saved == head  # exactly the value's blocks are not run again


@pytest.mark.parametrize("method", ["fk", "dps"])
def test_steering_is_the_same_with_and_without_sharing(generator, pipeline, stitched, method):
    denoiser = denoiser_of(generator, pipeline, stitched)
    found = []
    for own in (denoiser, replace(denoiser, null_text=False)):
        if method == "fk":
            found.append(fk(own, stitched, FeynmanKac(particles=3, proposals=2, window=[1, 3], every=1)))
        else:
            found.append(dps(own, stitched, Guidance(strength=20.0)))
    torch.testing.assert_close(found[0].latents, found[1].latents, atol=1e-3, rtol=1e-3)


def test_a_value_that_reads_prompts_begins_the_prompts_branch(generator, pipeline):
    reads = StitchedValueModel.from_pretrained(f"{VALUE}_prompt", "cpu", BackboneHead(SD3, pipeline.transformer))
    stitched = StitchedValue({"aesthetic": reads}, {"aesthetic": 1.0})
    denoiser = denoiser_of(generator, pipeline, stitched)
    latents = denoiser.start(2).latents
    values, known = stitched.measure(denoiser, latents, 1)
    assert set(known.passes) == {"prompt"} and reads.block == 2
    whole = denoiser.velocity(latents, denoiser.sigmas[1], Known())
    torch.testing.assert_close(denoiser.velocity(latents, denoiser.sigmas[1], known), whole, atol=1e-5, rtol=1e-5)
    backwards = torch.arange(len(PROMPTS) - 1, -1, -1)
    swapped = replace(denoiser, conditions=denoiser.conditions.select(backwards))
    assert (stitched.measure(swapped, latents, 1)[0] - values).abs().min() > 1e-3


def test_blocks_of_another_network_or_under_another_negative_prompt_are_not_shared(generator, pipeline, stitched):
    settings = Settings(steps=4, guidance=2.0)
    other = make_denoiser(generator, PROMPTS, *encode(pipeline, PROMPTS, "grey", 13), value=stitched, settings=settings)
    assert not other.null_text
    apart = StitchedValueModel.from_pretrained(VALUE)
    own = StitchedValue({"aesthetic": apart}, {"aesthetic": 1.0})
    denoiser = denoiser_of(generator, pipeline, own)
    _, known = own.measure(denoiser, denoiser.start(2).latents, 1)
    assert not denoiser.null_text and not known.passes and apart.config["backbone"]["path"] == MODEL


def test_micro_batches_change_nothing(generator, pipeline, stitched):
    found = []
    for size in (2, 64):
        denoiser = denoiser_of(generator, pipeline, stitched, micro_batch=size, order=2)
        found.append(fk(denoiser, stitched, FeynmanKac(particles=3, proposals=2, window=[1, 3], every=2)).latents)
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)
