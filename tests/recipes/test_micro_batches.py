"""Micro batches change speed and memory, and of the results only the rounding."""

import pytest
import torch

from nft.config import load_recipe
from nft.cost import micro_batch
from nft.cost.memory import memory, with_overhead
from nft.cost.micro_batch import auto_lines, fit, print_plan
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.tracking import read_metrics
from tests.tiny import AWM, DRAFT, FLOW_GRPO

GIB = 2**30
EPOCHS = ("epochs=2", "train.updates_per_epoch=2", "evaluation.every=1", "train.levels_per_sample=2")
CUTS = {
    "training in smaller ones": ("train.micro_batch=1", "evaluation.micro_batch=3"),
    "training in larger ones, none of them even": ("rollout.micro_batch=2", "train.micro_batch=3"),
    "rollouts across groups": ("rollout.micro_batch=3", "evaluation.micro_batch=1"),
}


def learnt(trainer) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in trainer.learner.policy.tensors("current").values()])


def numbers(folder) -> list[dict[str, float]]:
    timed = ("seconds/", "images_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_metrics(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), AWM, *((*one, "train.levels_per_sample=1") for one in (DRAFT, FLOW_GRPO))])
def test_results_do_not_depend_on_any_micro_batch(train, tmp_path, more):
    whole = train(tmp_path / "whole", *EPOCHS, *more)
    expected = numbers(tmp_path / "whole")
    assert len(expected) == 3 and whole.learner.step == 4
    for name, cut in CUTS.items():
        other = train(tmp_path / name, *EPOCHS, *more, *cut)
        apart = (learnt(other) - learnt(whole)).abs().mean() / whole.recipe.train.learning_rate
        assert apart < 1e-3, name
        for row, same in zip(expected, numbers(tmp_path / name), strict=True):
            assert row.keys() == same.keys()
            # Adam turns a gradient of almost nothing by its sign, so rounding shows more in the second epoch.
            assert all(same[key] == pytest.approx(row[key], rel=2e-3, abs=1e-5) for key in row), (name, row, same)


def published(*more: str):
    return load_recipe("recipes/aesthetic_pixel.yaml", list(more))


@pytest.mark.slow
def test_auto_is_the_largest_power_of_two_that_the_plan_says_fits():
    recipe = published("rollout.micro_batch=auto", "train.updates_per_epoch=1")
    available = 40 * GIB
    fitted = fit(recipe, 1, available)
    chosen = fitted.train.micro_batch

    def needed(size: int) -> float:
        expected = memory(published(f"rollout.micro_batch={size}", f"train.micro_batch={size}"))
        return with_overhead(expected["train"]) * GIB

    assert chosen >= 2 and chosen & (chosen - 1) == 0
    assert needed(chosen) <= available < needed(2 * chosen)
    assert fit(recipe, 1, 80 * GIB).train.micro_batch > chosen
    assert fitted.rollout.micro_batch > chosen  # no gradient is kept there
    text = "\n".join(auto_lines(recipe, available))
    assert "rollout.micro_batch, train.micro_batch, evaluation.micro_batch" in text and "40.0 GiB" in text


@pytest.mark.slow
def test_auto_shares_the_work_evenly():
    recipe = published("rollout.micro_batch=auto", "rollout.groups=18", "rollout.group_size=8")
    sizes = {processes: fit(recipe, processes, 10**15).rollout.micro_batch for processes in (1, 9, 18, 144)}
    assert sizes == {1: 256, 9: 16, 18: 8, 144: 1}


def test_numbers_stay_and_give_the_defaults_of_the_others():
    recipe = published("rollout.micro_batch=6", "evaluation.micro_batch=20")
    fitted = fit(recipe, 3, GIB)
    assert (fitted.rollout.micro_batch, fitted.train.micro_batch, fitted.evaluation.micro_batch) == (6, 6, 20)
    assert auto_lines(recipe, GIB) == []


def test_the_plan_tells_what_auto_is_on_a_cpu(capsys):
    print_plan(load_recipe("recipes/shapes/aesthetic.yaml", ["rollout.micro_batch=auto", "train.micro_batch=4"]), 2)
    text = capsys.readouterr().out
    assert "8 in rollouts, 4 in training, 8 in evaluation" in text and "at most 8 on a CPU" in text


def test_auto_needs_a_model_whose_shapes_are_known(monkeypatch):
    def unknown(recipe):
        raise InputError("the shapes of somebody/model are not known here")

    monkeypatch.setattr(micro_batch, "memory", unknown)
    with pytest.raises(InputError, match=r"train.micro_batch cannot be auto.*not known here; give a number"):
        fit(published("train.micro_batch=auto"), 1, 80 * GIB)
