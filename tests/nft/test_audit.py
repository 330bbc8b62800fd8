"""The audit tells a value model that has come apart from the true reward from one that has not."""

import torch

from nft.audit import Audit, AuditRecipe, audited


def pairs(count: int, correlation: float, shift: float = 0.0, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    truth = 5 + torch.randn(count, generator=random)
    other = 5 + torch.randn(count, generator=random)
    return correlation * truth + (1 - correlation**2) ** 0.5 * other + shift, truth


def test_a_following_value_is_not_reported():
    audit = Audit(AuditRecipe(every=1))
    for seed in range(8):
        figures = audit.add(*pairs(32, 0.8, seed=seed))
        assert audit.drift() is None
    assert figures["audit/spearman"] > 0.5 and abs(figures["audit/slope"] - 0.8) < 0.4


def test_a_value_that_follows_nothing_is_reported_within_three_audits():
    audit, told = Audit(AuditRecipe(every=1)), []
    for seed in range(3):
        audit.add(*pairs(32, 0.0, seed=seed))
        told.append(audit.drift())
    assert any(told) and "rank correlation" in next(text for text in told if text)


def test_a_value_that_ranks_well_at_another_scale_is_reported():
    for scale in (0.3, 4.0):
        audit = Audit(AuditRecipe(every=1))
        values, truth = pairs(32, 0.8)
        figures = audit.add(5 + scale * (values - 5), truth)
        assert abs(figures["audit/slope"] * scale - 0.8) < 0.3
        drift = audit.drift() or ""
        assert "times as much as the value" in drift and "0.57 to 1.75" in drift


def test_progress_of_the_training_is_not_taken_for_agreement():
    audit = Audit(AuditRecipe(every=1))
    for seed in range(3):
        values, truth = pairs(32, 0.0, seed=seed)
        figures = audit.add(values + 5 * seed, truth + 5 * seed)
    assert abs(figures["audit/spearman"]) < 0.3 and abs(figures["audit/slope"]) < 0.3
    assert "rank correlation" in (audit.drift() or "")


def test_a_value_that_rises_away_from_the_reward_is_reported():
    audit = Audit(AuditRecipe(every=1))
    for seed in range(3):
        audit.add(*pairs(32, 0.8, seed=seed))
    assert audit.drift() is None
    for seed in range(3, 6):
        audit.add(*pairs(32, 0.8, shift=3.0, seed=seed))
    assert "has risen" in (audit.drift() or "")


def test_a_constant_value_has_no_rank_correlation_and_no_slope():
    audit = Audit(AuditRecipe(every=1))
    figures = audit.add(torch.full((16,), 2.0), torch.randn(16))
    assert figures["audit/spearman"] == 0 and figures["audit/slope"] == 0 and audit.drift() is not None


def test_an_audit_goes_on_after_a_restart():
    first, second = Audit(AuditRecipe(every=1)), Audit(AuditRecipe(every=1))
    for seed in range(4):
        first.add(*pairs(16, 0.5, seed=seed))
    second.load_state_dict(first.state_dict())
    assert second.add(*pairs(16, 0.5, seed=9)) == first.add(*pairs(16, 0.5, seed=9))
    assert second.drift() == first.drift()


def test_the_samples_of_an_audit_are_addressed():
    assert audited(64, 8, 0, 3) == audited(64, 8, 0, 3) != audited(64, 8, 0, 4)
    assert len(audited(64, 8, 0, 3)) == 8 and len(audited(4, 8, 0, 3)) == 4
