"""The base model is run at a random share of the levels, and the expected loss stays the same."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from nft.config import load_recipe
from nft.cost.plan import work_lines
from nft.objectives import matching
from nft.objectives.matching import in_share
from nft.objectives.nft import NFT
from stitchvm_reward.errors import InputError


@pytest.mark.parametrize("share", [0.125, 0.3, 0.75])
def test_a_pass_is_in_the_share_with_its_probability(share):
    for number in (0, 7, 1001):
        found = sum(in_share(share, seed, number) for seed in range(3000)) / 3000
        assert found == pytest.approx(share, abs=4 * (share * (1 - share) / 3000) ** 0.5)


@pytest.mark.parametrize("share", [0.125, 0.3, 0.75, 1.0])
def test_the_share_is_even_over_a_run(share):
    chosen = [in_share(share, 5, number) for number in range(400)]
    for start, count in ((0, 400), (3, 24), (90, 7)):
        assert abs(sum(chosen[start : start + count]) - count * share) < 1


def test_the_default_share_is_an_eighth_and_told_in_the_plan():
    settings = ["train.old_schedule=1", "rollout.steps=25", "train.levels_per_sample=24"]
    recipe = load_recipe("recipes/aesthetic_pixel.yaml", settings)
    levels = recipe.train.levels_per_sample
    assert sum(in_share(recipe.train.reference_share, 0, number) for number in range(8 * levels)) == levels
    assert NFT.cost(recipe.train).frozen == pytest.approx(1.125)
    assert "at 0.125 of the levels" in "\n".join(work_lines(recipe, 1))


@pytest.mark.parametrize("settings", [("train.beta_kl=0.01",), ("train.beta_kl=0.001", "train.reference_share=0.05")])
def test_a_share_that_would_let_the_base_model_count_too_much_is_refused(settings):
    with pytest.raises(InputError, match=r"reference_share must be 1, or at least train.beta_kl / 0.01"):
        load_recipe("recipes/aesthetic.yaml", list(settings))
    load_recipe("recipes/aesthetic.yaml", [*settings, "train.reference_share=1"])


@pytest.mark.slow
def test_the_loss_over_all_shares_is_the_loss_with_the_whole_reference(make_trainer, tmp_path, monkeypatch):
    settings = ("train.levels_per_sample=2", "train.beta_kl=0.004")
    trainer = make_trainer(tmp_path / "run", *settings, "train.reference_share=0.5")
    objective, calls = trainer.objective, Counter()
    for matrix in trainer.learner.policy.tensors("current").values():  # away from the base model
        matrix.data += 0.05 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(matrix.numel()))
    rollout = trainer.collector.collect(0)[0]
    rollout = replace(rollout, worth=torch.linspace(0, 1, len(rollout.samples)))
    frozen = trainer.learner.frozen_velocity

    def counted(adapter, *inputs):
        calls[adapter] += 1
        return frozen(adapter, *inputs)

    monkeypatch.setattr(trainer.learner, "frozen_velocity", counted)

    def sums(chosen):
        """Loss and terms of a micro batch where the base model is run at the chosen levels."""
        calls.clear()
        monkeypatch.setattr(matching, "in_share", lambda share, seed, number: number in chosen)
        with torch.no_grad():
            found = [call() for call in objective.losses(rollout, 0)]
        assert calls[None] == len(chosen)
        return sum(torch.cat([loss[None], parts]) for loss, parts in found)

    halves = (sums({0}) + sums({1})) / 2
    objective.train.reference_share = 1.0
    whole = sums({0, 1})
    torch.testing.assert_close(halves, whole, rtol=1e-6, atol=0)
    kl = objective.terms.index("kl") + 1
    assert float(whole[kl]) > 1e-4 and not torch.allclose(sums({0})[kl], whole[kl])
