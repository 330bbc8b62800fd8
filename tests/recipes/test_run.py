"""What a run leaves behind, and that its settings do what they say."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft.tuners.lora import LoraLayer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nft.config import load_recipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.tracking import read_scores

MODEL = "miniature/weights/sd3"
USER_REWARDS = """
import torch

def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

def brightness(images, prompts):
    return images.mean((1, 2, 3))

def flat(images, prompts):
    return torch.full((len(prompts),), 0.3)

def broken(images, prompts):
    scores = brightness(images, prompts)
    scores[-1] = float("nan")
    return scores
"""


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """The trainer and the folder of a short run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = ("epochs=3", "train.updates_per_epoch=2", "evaluation.every=1", "checkpoint.keep=2")
    settings += ("train.reference_share=1",)  # every step reports the distance to the base model
    return train(folder, *settings), folder


@pytest.fixture(scope="module")
def baseline(train, tmp_path_factory):
    """One epoch of two optimizer steps, to compare other settings with."""
    folder = tmp_path_factory.mktemp("baseline") / "run"
    train(folder, "epochs=1", "train.updates_per_epoch=2")
    return folder


@pytest.fixture
def user_rewards(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_a_user.py").write_text(USER_REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))


def function(name: str, weight: float = 1.0) -> str:
    return f"{{kind: function, function: 'rewards_of_a_user:{name}', weight: {weight}}}"


def test_a_run_leaves_its_recipe_metrics_pictures_curves_and_weights(finished):
    trainer, folder = finished
    assert load_recipe(folder / "recipe.yaml") == trainer.recipe
    for name, least in (("before_after.png", 10_000), ("curves.png", 10_000), ("lora.safetensors", 10_000)):
        assert (folder / name).stat().st_size > least
    for name in ("before_after.png", "curves.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50, f"{name} is blank"


def test_metrics_have_a_finite_row_for_every_epoch_and_for_the_untrained_policy(finished):
    _, folder = finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 0), (1, 2), (2, 4), (3, 6)]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    measures = ("aesthetic", "total", "checker", "checker_share", "true_aesthetic", "colourfulness")
    held_out = {f"held_out/{name}" for name in measures} | {f"held_out/{name}_std" for name in measures}
    trained = {"reward/aesthetic", "reward/aesthetic_std", "reward/total", "reward/total_std"} | {
        f"train/{name}" for name in ("policy_loss", "kl", "old_deviation", "gradient_norm", "learning_rate")
    }
    timed = {f"seconds/{name}" for name in ("rollout", "decode", "score", "train", "evaluate")}
    assert held_out <= rows[0].keys() and not trained & rows[0].keys()
    for row in rows[1:]:
        assert held_out | trained | timed | {"images_per_second"} <= row.keys()
        assert row["train/gradient_norm"] > 0 and row["train/old_deviation"] > 0 and row["train/kl"] > 0
        assert row["reward/total"] == row["reward/aesthetic"] and row["reward/aesthetic_std"] > 0
        assert row["held_out/total"] == row["held_out/aesthetic"]
    # A checkpoint is written behind the row of its epoch, so the next row tells how long that took.
    assert all(row["seconds/save"] > 0 for row in rows[2:])
    assert len({row["held_out/aesthetic"] for row in rows}) == len(rows), "the evaluated policy must change"
    scores = read_scores(folder)
    assert list(scores) == [0, 1, 2, 3] and set(scores[0]) == set(measures)
    for row in rows:
        each = scores[row["epoch"]]["true_aesthetic"]
        assert len(each) == 4 and row["held_out/true_aesthetic"] == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_tensorboard_shows_the_metrics_the_pictures_and_the_optimality(finished):
    _, folder = finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "histograms": 0}).Reload()
    for name, count in (("held_out/aesthetic", 4), ("reward/total", 3), ("train/old_deviation", 3)):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        told = [(row["epoch"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert shown == told and len(shown) == count
    assert [event.step for event in events.Images("held_out")] == [0, 1, 2, 3]
    assert [event.step for event in events.Histograms("optimality")] == [1, 2, 3]


def test_only_the_newest_checkpoints_are_kept_and_no_unfinished_one(finished):
    _, folder = finished
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["epoch-000002", "epoch-000003"]


def test_the_lora_file_gives_diffusers_the_averaged_adapter_at_full_strength(finished, adapters):
    _, folder = finished
    pipeline = StableDiffusion3Pipeline.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True)
    base = {name: weight.detach().clone() for name, weight in pipeline.transformer.named_parameters()}
    pipeline.load_lora_weights(str(folder / "lora.safetensors"))
    layers = {name: part for name, part in pipeline.transformer.named_modules() if isinstance(part, LoraLayer)}
    # Eight projections a block; the last block's text stream has no output projection.
    assert len(layers) == 8 * pipeline.transformer.config.num_layers - 1
    pipeline.fuse_lora()
    tensors, scale = adapters(folder, 3), 8 / 4
    assert {key.split("/")[1].rsplit(".", 1)[0] for key in tensors} == layers.keys()

    def delta(adapter: str, layer: str) -> torch.Tensor:
        return scale * tensors[f"{adapter}/{layer}.lora_B"].double() @ tensors[f"{adapter}/{layer}.lora_A"].double()

    error, largest, to_current = 0.0, 0.0, 0.0
    for name, layer in layers.items():
        found = (layer.base_layer.weight.detach() - base[f"{name}.weight"]).double()
        expected = delta("ema", name)
        error = max(error, float((found - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
        to_current = max(to_current, float((found - delta("current", name)).abs().max()))
    assert error < 1e-6
    assert largest > 100 * error, "the adapter must be far larger than the tolerance"
    assert to_current > 10 * error, "the file must hold the average, not the trained weights"


def test_old_is_frozen_within_an_epoch_and_current_differs_from_it_from_the_second_step_on(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", "epochs=2", "train.updates_per_epoch=2")
    deviations, olds, currents = [], [], []
    step = trainer.learner._optimizer_step

    def recorded(*arguments):
        terms = step(*arguments)
        deviations.append(float(terms[2]))
        for seen, name in ((olds, "old"), (currents, "current")):
            seen.append(
                torch.cat([tensor.detach().flatten() for tensor in trainer.learner.policy.tensors(name).values()])
            )
        return terms

    trainer.learner._optimizer_step = recorded
    trainer.train()
    assert len(deviations) == 4
    assert deviations[0] == 0 and min(deviations[1:]) > 0
    assert torch.equal(olds[0], olds[1]) and torch.equal(olds[2], olds[3])
    assert not torch.equal(olds[1], olds[2])
    assert all(not torch.equal(earlier, later) for earlier, later in zip(currents, currents[1:]))
    assert all(not torch.equal(old, current) for old, current in zip(olds, currents))


def test_an_old_policy_that_follows_at_once_never_differs_at_one_step_an_epoch(train, rows, tmp_path):
    train(tmp_path / "run", "epochs=2", "train.old_schedule=0")
    assert [row["train/old_deviation"] for row in rows(tmp_path / "run")[1:]] == [0, 0]


def test_without_a_weight_on_it_the_distance_to_the_reference_is_not_computed(baseline, train, rows, tmp_path):
    train(tmp_path / "run", "epochs=1", "train.updates_per_epoch=2", "train.beta_kl=0")
    assert rows(tmp_path / "run")[1]["train/kl"] == 0
    assert rows(baseline)[1]["train/kl"] > 0


@pytest.mark.parametrize(
    "setting",
    [
        "train.levels=continuous",
        "train.levels_per_sample=3",
        "train.space=velocity",
        "train.per_group_std=true",
        "train.beta=0.5",
        "seed=1",
    ],
)
def test_a_setting_trains_and_makes_a_difference(setting, baseline, train, rows, adapters, tmp_path):
    train(tmp_path / "run", "epochs=1", "train.updates_per_epoch=2", setting)
    row, usual = rows(tmp_path / "run")[1], rows(baseline)[1]
    assert all(math.isfinite(value) for value in row.values())
    assert row["train/gradient_norm"] > 0
    # These settings are the training's: only the seed changes what the first epoch rolls out.
    assert (row["reward/total"] == usual["reward/total"]) == (setting != "seed=1")
    tensors, others = adapters(tmp_path / "run", 1), adapters(baseline, 1)
    assert max(float((tensors[key] - others[key]).abs().max()) for key in tensors) > 1e-5


def test_both_solvers_train_and_roll_out_different_images(train, rows, adapters, tmp_path):
    # First and last step are first order, and so is the one after noise level 1: five steps show a difference.
    for solver in ("euler", "dpm2"):
        train(tmp_path / solver, "epochs=1", "rollout.steps=5", f"rollout.solver={solver}")
    first, second = (rows(tmp_path / solver) for solver in ("euler", "dpm2"))
    assert abs(first[1]["reward/total"] - second[1]["reward/total"]) > 1e-3
    assert first[0] == second[0], "evaluation keeps to its own solver"
    assert first[1]["train/gradient_norm"] > 0 and second[1]["train/gradient_norm"] > 0
    one, other = (adapters(tmp_path / solver, 1) for solver in ("euler", "dpm2"))
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_users_function_trains_and_its_opposite_takes_the_opposite_first_step(
    user_rewards, train, rows, adapters, tmp_path
):
    steps = {}
    for name, weight in (("for", 1.0), ("against", -1.0)):
        # Without decay the first optimizer step shows the gradient alone.
        settings = ("epochs=1", "train.updates_per_epoch=1", "train.weight_decay=0")
        train(tmp_path / name, *settings, f"rewards=[{function('redness', weight)}]")
        tensors = adapters(tmp_path / name, 1)
        steps[name] = torch.cat([t.flatten() for k, t in tensors.items() if k.startswith("current/") and "lora_B" in k])
    ours, theirs = rows(tmp_path / "for")[1], rows(tmp_path / "against")[1]
    assert ours["reward/redness"] == theirs["reward/redness"] == ours["reward/total"] == -theirs["reward/total"]
    assert ours["reward/redness_std"] > 0
    assert steps["for"].abs().max() > 1e-4
    assert torch.cosine_similarity(steps["for"], steps["against"], dim=0) < -0.99


def test_two_rewards_are_logged_apart_and_summed_by_weight(user_rewards, train, rows, tmp_path):
    both = f"rewards=[{function('redness', 0.5)}, {function('brightness', 2.0)}]"
    train(tmp_path / "run", "epochs=1", both)
    for row, kind in zip(rows(tmp_path / "run"), ("held_out", "reward")):
        red, bright = row[f"{kind}/redness"], row[f"{kind}/brightness"]
        assert red != bright
        assert row[f"{kind}/total"] == pytest.approx(0.5 * red + 2 * bright, abs=1e-6)
        assert row[f"{kind}/redness_std"] > 0 and row[f"{kind}/brightness_std"] > 0


def test_a_function_that_returns_nan_stops_the_run_with_its_name(user_rewards, train, tmp_path):
    with pytest.raises(InputError, match="broken gave 1 of 4 scores that are not finite"):
        train(tmp_path / "run", "epochs=1", f"rewards=[{function('broken')}]")
    assert not Path(tmp_path / "run" / "checkpoints").exists()


def test_a_constant_reward_is_warned_of_by_name(user_rewards, train, rows, tmp_path, capsys):
    train(tmp_path / "run", "epochs=1", f"rewards=[{function('flat')}]")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert any("flat" in line for line in warnings)
    row = rows(tmp_path / "run")[1]
    assert row["reward/flat"] == pytest.approx(0.3) and row["train/collapsed_groups"] == 1


def test_a_constant_reward_moves_no_weight(user_rewards, train, rows, adapters, tmp_path):
    """The mean of equal numbers may be rounded: Adam would make a full step of that difference."""
    groups = ("rollout.group_size=7", "rollout.micro_batch=7")
    still = ("train.beta_kl=0", "train.weight_decay=0")
    train(tmp_path / "run", "epochs=1", *groups, *still, f"rewards=[{function('flat')}]")
    assert rows(tmp_path / "run")[1]["train/gradient_norm"] == 0
    tensors = adapters(tmp_path / "run", 1)
    assert all(tensor.abs().max() == 0 for key, tensor in tensors.items() if key.endswith("lora_B"))


def test_a_reward_that_varies_is_not_warned_of(user_rewards, train, tmp_path, capsys):
    train(tmp_path / "run", "epochs=1", f"rewards=[{function('redness')}]")
    assert "warning" not in capsys.readouterr().out
