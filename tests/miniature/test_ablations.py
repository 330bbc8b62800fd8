"""Values are replaced as the ablations say, and nothing else of the run is."""

import pytest
import torch

from miniature import ablations
from tests.tiny import STOPPED


def test_shuffled_values_are_the_same_ones_at_other_places():
    values = torch.arange(8.0)
    moved = ablations.shuffled(values, torch.Generator().manual_seed(0))
    assert torch.equal(moved.sort().values, values) and not (moved == values).any()


def test_noise_has_the_spread_of_the_values():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1)) * 3
    noise = ablations.noised(values, torch.Generator().manual_seed(0)) - values
    assert float(noise.std()) == pytest.approx(3, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([values, noise]))[0, 1])) < 0.02


def test_only_the_scores_of_a_run_are_replaced(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", *STOPPED)
    before = trainer.collector.collect(0)
    totals = torch.cat([rollout.rewards["total"] for rollout in before])
    score = trainer.collector.score
    for kind in ablations.KINDS:
        trainer.collector.score = score
        ablations.replace_scores(trainer.collector, trainer.auditor.scorer, kind, lambda: 0)
        after = trainer.collector.collect(0)
        for ours, theirs in zip(after, before, strict=True):
            assert torch.equal(ours.anchor, theirs.anchor)
        again = torch.cat([rollout.rewards["total"] for rollout in after])
        assert not torch.equal(again, totals) and torch.isfinite(again).all()
        assert torch.equal(again.sort().values, totals.sort().values) == (kind == "shuffled")
