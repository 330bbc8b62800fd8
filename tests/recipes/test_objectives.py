"""Runs of the objectives that compare rewards, other than NFT: what they log, and how they go on."""

from pathlib import Path

import pytest

from tests.tiny import AWM, FLOW_GRPO, STOPPED

pytestmark = pytest.mark.slow

KINDS = {
    "awm": (*AWM, *STOPPED, "train.reference_share=1"),
    "flow_grpo": (*FLOW_GRPO, "train.sde_steps=2", "train.sde_clip=1e-6"),
    "flow_grpo_stopped": (*FLOW_GRPO, *STOPPED, "train.sde_within=1"),
}
SETTINGS = ("train.updates_per_epoch=2", "rollout.micro_batch=2", "train.learning_rate=1e-3", "train.beta_kl=1e-3")


@pytest.fixture(scope="module", params=KINDS)
def straight(request, train, tmp_path_factory) -> tuple[tuple[str, ...], Path]:
    """The settings and the folder of a run of three epochs that nothing disturbs."""
    settings, run = (*SETTINGS, *KINDS[request.param]), tmp_path_factory.mktemp(request.param) / "run"
    train(run, *settings, "epochs=3")
    return settings, run


def test_a_run_logs_its_advantages_and_its_terms(straight, rows):
    settings, run = straight
    awm = "train.objective=awm" in settings
    for index, row in enumerate(rows(run)[1:]):
        assert row["step"] == 2 * (index + 1) and row["train/advantage_std"] > 0
        assert row["train/kl"] > 0 and row["train/gradient_norm"] > 0 and "train/optimality_std" not in row
        assert ("train/old_deviation" in row, "train/clipped" in row) == (awm, not awm)
        if awm:
            assert row["train/old_deviation"] > 0
        else:  # the second of the two updates is no longer that of the policy that sampled
            assert 0 <= row["train/clipped"] <= 0.5
    assert (run / "lora.safetensors").is_file()
    if "train.sde_clip=1e-6" in settings:
        assert rows(run)[-1]["train/clipped"] > 0.25


def test_a_stopped_run_goes_on_bit_for_bit(straight, train, digests, rows, tmp_path):
    settings, run = straight
    train(tmp_path / "run", *settings, "epochs=1")
    train(tmp_path / "run", *settings, "epochs=3")
    assert digests(tmp_path / "run", 3) == digests(run, 3)
    assert rows(tmp_path / "run")[-1] == rows(run)[-1]
