"""steer(): a diffusers pipeline in, pictures and a trace out."""

from dataclasses import replace

import pytest
import torch

from stitchvm_reward.errors import InputError
from stitchvm_reward.families import SD3
from stitchvm_reward.steering.build import steer
from stitchvm_reward.steering.sampling import require_memory
from stitchvm_reward.steering.settings import BestOfN, FeynmanKac, Guidance, Settings
from stitchvm_reward.steering.values import MonteCarloValue, StitchedValue
from stitchvm_reward.stitching.value_model import StitchedValueModel
from tests.stitchvm_reward.steering.conftest import VALUE

PROMPTS = ["a red cross, white background", "two green circles on black", "purple square, white background"]
FK = FeynmanKac(particles=4, proposals=2, window=[1, 5], every=1)
SETTINGS = Settings(
    steps=6, guidance=2.0, best_of_n=BestOfN(particles=4), fk=FK, dps=Guidance(strength=100.0), micro_batch=8
)


def plain(pipeline, value, settings=SETTINGS):
    once = Settings(steps=settings.steps, guidance=settings.guidance, best_of_n=BestOfN(particles=1))
    return steer(pipeline, PROMPTS, "best_of_n", value, once)


@pytest.mark.parametrize("method", ["best_of_n", "fk", "dps"])
@pytest.mark.parametrize("by", ["stitched", "pixels"])
def test_every_method_raises_the_reward_and_tells_what_it_did(pipeline, value, reward, method, by):
    chosen = value if by == "stitched" else reward
    found = steer(pipeline, PROMPTS, method, chosen, SETTINGS)
    assert found.images.shape == (3, 3, 64, 64) and 0 <= float(found.images.min()) <= float(found.images.max()) <= 1
    before = reward.score(plain(pipeline, chosen).images, PROMPTS)
    assert float(reward.score(found.images, PROMPTS).mean()) > float(before.mean())
    assert len(found.trace) == 3
    for told in found.trace:
        assert told["end"]["values"][told["chosen"]] == max(told["end"]["values"])
        if method == "fk":
            assert [event["step"] for event in told["events"]] == [1, 2, 3, 4, 5]
            assert all(1 <= event["effective"] <= 4.0001 and len(event["ancestors"]) == 4 for event in told["events"])
        if method == "dps":
            assert len(told["events"]) == 6


def test_a_picture_depends_on_its_place_and_the_seed_not_on_the_others(pipeline, value):
    whole = steer(pipeline, PROMPTS, "fk", value, SETTINGS).images
    fewer = steer(pipeline, PROMPTS[:1], "fk", value, SETTINGS).images
    torch.testing.assert_close(whole[:1], fewer, atol=1e-3, rtol=0)
    other = steer(pipeline, PROMPTS[:1], "fk", value, replace(SETTINGS, seed=1)).images
    assert float((whole[:1] - other).abs().max()) > 0.1


def test_a_weighted_sum_steers_by_all_of_it(pipeline, value):
    models = {"up": value, "down": value}
    against = steer(pipeline, PROMPTS, "fk", StitchedValue(models, {"up": 1.0, "down": -2.0}), SETTINGS)
    both = steer(pipeline, PROMPTS, "fk", models, SETTINGS)
    ends = [[max(told["end"]["values"]) for told in found.trace] for found in (against, both)]
    assert all(end < 0 for end in ends[0]) and all(end > 0 for end in ends[1])


def test_a_value_model_steers_a_generator_of_another_size_with_the_same_autoencoder(other_pipeline):
    value = StitchedValueModel.from_pretrained(VALUE)
    for method in ("fk", "dps"):
        steered = steer(other_pipeline, PROMPTS, method, value, SETTINGS)
        before = plain(other_pipeline, value)
        gain = [told["end"]["values"][told["chosen"]] for told in steered.trace]
        base = [told["end"]["values"][0] for told in before.trace]
        assert sum(gain) > sum(base) + 0.5


def test_a_monte_carlo_value_is_near_the_reward_of_what_the_latent_becomes(pipeline, reward):
    settings = Settings(steps=6, guidance=1.0, fk=FeynmanKac(particles=2, window=[5, 5], every=1))
    found = steer(pipeline, PROMPTS[:1], "fk", MonteCarloValue({"reward": reward}, {"reward": 1.0}, 2), settings)
    (event,), end = found.trace[0]["events"], found.trace[0]["end"]["values"]
    assert sorted(event["values"])[-1] == pytest.approx(max(end), abs=0.3)
    with pytest.raises(InputError, match="gives none"):
        steer(pipeline, PROMPTS[:1], "dps", MonteCarloValue({"reward": reward}, {"reward": 1.0}, 2), settings)


def test_adapters_and_a_value_model_on_the_same_blocks_are_refused(make_pipeline, value, reward):
    from peft import LoraConfig

    from stitchvm_reward.diffusion.backbone import BackboneHead

    tuned = make_pipeline()
    shared = StitchedValueModel.from_pretrained(VALUE, "cpu", BackboneHead(SD3, tuned.transformer))
    tuned.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"]))
    with pytest.raises(InputError, match="which have adapters now"):
        steer(tuned, PROMPTS[:1], "fk", shared, SETTINGS)
    assert steer(tuned, PROMPTS[:1], "fk", value, SETTINGS).images.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "method", "told"),
    [
        ({"fk": FeynmanKac(window=[8, 32])}, "fk", "fk.window must end within the schedule's 6 steps"),
        ({"dps": Guidance(window=[0, 6])}, "dps", "dps.window must lie within the schedule, steps 0 to 5"),
        ({"best_of_n": BestOfN(prune_at=6)}, "best_of_n", "best_of_n.prune_at must lie within the schedule's 6 steps"),
        ({"stochasticity": 0.0, "fk": FK}, "fk", "fk.proposals must be 1 where stochasticity is 0"),
        ({"order": 3}, "fk", "order must be 1 or 2, got 3"),
        ({}, "smc", "the method must be one of best_of_n, fk, dps, got 'smc'"),
        ({"fk": FeynmanKac(particles=10**9, window=[1, 5])}, "fk", "1000000000 particles must fit into memory"),
    ],
)
def test_settings_that_do_not_fit_are_told_in_one_line(pipeline, reward, changes, method, told):
    with pytest.raises(InputError) as raised:
        steer(pipeline, PROMPTS[:1], method, reward, Settings(steps=6, **changes))
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_other_things_are_no_value(pipeline):
    for wrong in (None, 3, {}, {"a": 1}):
        with pytest.raises(InputError, match="value must be a StitchedValueModel"):
            steer(pipeline, PROMPTS[:1], "fk", wrong, SETTINGS)
    with pytest.raises(InputError, match="at least one prompt"):
        steer(pipeline, [], "fk", _Flat(), SETTINGS)


class _Flat:
    """A reward without a gradient."""

    def score(self, images, prompts):
        return torch.zeros(len(images))


def test_a_reward_without_a_gradient_cannot_guide(pipeline):
    with pytest.raises(InputError, match="dps needs a gradient, reward gives none"):
        steer(pipeline, PROMPTS[:1], "dps", _Flat(), SETTINGS)


def test_memory_is_counted_before_it_is_used():
    settings = Settings(micro_batch=1, fk=FeynmanKac(particles=8, proposals=6))
    require_memory("fk", settings, 10_000, 48 * 10_000)
    with pytest.raises(InputError, match="8 particles of 6 proposals must fit into memory"):
        require_memory("fk", settings, 10_001, 48 * 10_000)
