"""Runs that back-propagate their rewards: what they log, how they go on, and what they refuse."""

import shutil
from pathlib import Path

import pytest
import torch

from stitchvm_reward.errors import InputError
from tests.tiny import DRAFT, STOPPED

KINDS = {"full": ("train.draft_steps=2",), "stopped": STOPPED}
SETTINGS = ("train.updates_per_epoch=2", "rollout.micro_batch=2", "train.learning_rate=1e-3")
USER_REWARDS = """
import torch


def red(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def counted(images, prompts):
    return (images[:, 0] > 0.5).float().mean((1, 2))


def outside(images, prompts):
    return torch.tensor(images.numpy().mean((1, 2, 3)))


def hidden(images, prompts):
    scores, bad = red(images, prompts), torch.zeros(len(prompts), dtype=torch.bool)
    bad[-1] = images.requires_grad  # held-out images are fine
    return torch.where(bad, torch.nan, scores)
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """user(name) -> the recipe key of that reward."""
    (tmp_path / "draft_rewards.py").write_text(USER_REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name: f"rewards=[{{kind: function, function: 'draft_rewards:{name}'}}]"


@pytest.fixture(scope="module", params=KINDS)
def straight(request, train, tmp_path_factory) -> tuple[tuple[str, ...], Path]:
    """The settings and the folder of a run of three epochs that nothing disturbs."""
    settings, run = (*DRAFT, *SETTINGS, *KINDS[request.param]), tmp_path_factory.mktemp(request.param) / "run"
    train(run, *settings, "epochs=3")
    return settings, run


def test_a_run_logs_its_rewards_and_no_old_policy(straight, rows):
    settings, run = straight
    first, *rest = rows(run)
    assert "held_out/aesthetic" in first and (run / "lora.safetensors").is_file() and (run / "curves.png").is_file()
    for row in rest:
        figures = {f"reward/{name}" for name in ("aesthetic", "aesthetic_std", "total", "total_std")}
        figures |= {f"train/{name}" for name in ("policy_loss", "kl", "gradient_norm", "learning_rate")}
        assert figures <= row.keys()
        assert not {"train/old_deviation", "train/optimality_std", "train/skipped"} & row.keys()
        assert row["train/policy_loss"] == pytest.approx(-row["reward/total"], abs=1e-5)
        assert row["reward/total_std"] > 0 and row["train/gradient_norm"] > 0
        assert ("audit/spearman" in row) == ("audit.every=1" in settings)
    assert rest[0]["train/kl"] > 0 and rest[0]["step"] == 2
    assert rest[-1]["train/kl"] > rest[0]["train/kl"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(straight, train, digests, rows, tmp_path):
    settings, run = straight
    train(tmp_path / "run", *settings, "epochs=1")
    train(tmp_path / "run", *settings, "epochs=3")
    assert digests(tmp_path / "run", 3) == digests(run, 3)
    assert rows(tmp_path / "run")[-1] == rows(run)[-1]


@pytest.mark.slow
def test_a_signal_after_the_step_of_an_epoch_begins_that_epoch_again(train, make_trainer, digests, tmp_path):
    settings = (*DRAFT, *STOPPED, "train.learning_rate=1e-3", "epochs=2")
    train(tmp_path / "straight", *settings)
    trainer = make_trainer(tmp_path / "run", *settings)
    learn = trainer.objective.learn

    def interrupted(rollouts, epoch):
        learned = learn(rollouts, epoch)
        trainer.ranks.asked = epoch == 1  # noticed at the next sync, which is the audit's
        return learned

    trainer.objective.learn = interrupted
    assert not trainer.train() and trainer.learner.step == 2
    assert trainer.saved == 1
    train(tmp_path / "run", *settings)
    assert digests(tmp_path / "run", 2) == digests(tmp_path / "straight", 2)


@pytest.mark.slow
def test_a_users_differentiable_reward_is_raised(user, train, rows, tmp_path):
    train(tmp_path / "run", *DRAFT, user("red"), "epochs=4", "train.learning_rate=1e-3", "train.beta_kl=0")
    found = [row["held_out/red"] for row in rows(tmp_path / "run") if "held_out/red" in row]
    assert found[-1] > found[0]
    assert rows(tmp_path / "run")[1]["train/kl"] == 0


@pytest.mark.parametrize(
    "name, told",
    [
        ("counted", "reward counted has no gradient with respect to the image: use train.objective=nft"),
        ("outside", "draft_rewards:outside raised RuntimeError: Can't call numpy()"),
    ],
)
def test_a_reward_without_a_gradient_is_refused_by_name(user, train, tmp_path, name, told):
    with pytest.raises(InputError) as refused:
        train(tmp_path / "run", *DRAFT, user(name), "epochs=1")
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_score_that_is_not_finite_stops_the_run_though_its_gradient_is(user, train, tmp_path):
    with pytest.raises(InputError, match=r"reward hidden gave 2 of 8 scores that are not finite in epoch 1, update 1"):
        train(tmp_path / "run", *DRAFT, user("hidden"), "epochs=1")


def test_a_skipped_step_changes_nothing_and_is_counted(user, train, rows, adapters, tmp_path):
    train(tmp_path / "run", *DRAFT, user("hidden"), "epochs=2", "train.on_nonfinite=skip", "checkpoint.keep=2")
    assert [row["train/skipped"] for row in rows(tmp_path / "run")[1:]] == [1, 2]
    first, last = (adapters(tmp_path / "run", epoch) for epoch in (1, 2))
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_a_checkpoint_of_the_one_objective_is_not_gone_on_with_by_the_other(straight, overrides, tmp_path):
    from nft.config import load_recipe
    from stitchvm_reward.runs.run_folder import check_run_folder

    _, run = straight
    shutil.copytree(run, tmp_path / "run")
    settings = [setting for setting in straight[0] if not setting.startswith(("train.draft", "train.objective"))]
    settings.append("train.reference_share=1")
    with pytest.raises(InputError, match=r"train\.(objective|draft_steps) is ('draft'|2) there and ('nft'|1) here"):
        check_run_folder(load_recipe("recipes/shapes/aesthetic.yaml", overrides(tmp_path / "run", *settings)))


def test_saving_right_after_loading_gives_the_same_checkpoint(straight, make_trainer, digests, tmp_path):
    settings, run = straight
    shutil.copytree(run, tmp_path / "run")
    trainer = make_trainer(tmp_path / "run", *settings, "epochs=4")
    trainer._save(trainer.learner.tensors(), trainer.state_dict())
    trainer.writer.wait()
    assert digests(tmp_path / "run", 3) == digests(run, 3)
