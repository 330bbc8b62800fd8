"""Looking at a policy does not change it."""

import pytest
import torch


def test_evaluating_every_epoch_or_never_trains_the_same_weights_bit_for_bit(train, digests, rows, adapters, tmp_path):
    seen, unseen = tmp_path / "seen" / "run", tmp_path / "unseen" / "run"
    settings = ("epochs=3", "train.updates_per_epoch=2")
    train(seen, *settings, "evaluation.every=1")
    train(unseen, *settings, "evaluation.every=0")

    evaluated = {run: [row["epoch"] for row in rows(run) if "held_out/total" in row] for run in (seen, unseen)}
    assert evaluated == {seen: [0, 1, 2, 3], unseen: [0, 3]}
    first, last = adapters(seen, 2), adapters(seen, 3)
    assert any(not torch.equal(first[key], last[key]) for key in first)

    assert digests(seen, 3) == digests(unseen, 3)
    trained = [
        [{key: value for key, value in row.items() if key.startswith(("reward/", "train/"))} for row in rows(run)]
        for run in (seen, unseen)
    ]
    assert trained[0] == trained[1] and len(trained[0][1]) > 5
    assert rows(seen)[-1] == rows(unseen)[-1]


@pytest.mark.slow
def test_what_is_evaluated_with_does_not_change_the_weights(train, digests, tmp_path):
    settings = ("epochs=2", "train.updates_per_epoch=2", "evaluation.every=1")
    train(tmp_path / "a" / "run", *settings)
    train(tmp_path / "b" / "run", *settings, "evaluation.steps=4", "evaluation.samples=6", "evaluation.metrics=[]")
    assert digests(tmp_path / "a" / "run", 2) == digests(tmp_path / "b" / "run", 2)
