"""Checkpoints come back bit for bit, or say what is wrong with them."""

import json
import os
import shutil

import pytest
import torch

from stitchvm_reward.errors import InputError
from stitchvm_reward.runs import checkpoint
from stitchvm_reward.runs.recipe import CheckpointRecipe


def write(folder, epoch, keep=10, keep_every=0):
    tensors = {
        "adapters": {"a/b.lora_A": torch.full((2, 3), float(epoch)), "half": torch.ones(5).bfloat16()},
        "optimizer": {"0.step": torch.tensor(float(epoch))},
    }
    state, recipe = {"epoch": epoch, "nested": {"x": [1.5]}}, CheckpointRecipe(keep=keep, keep_every=keep_every)
    return checkpoint.save(folder, epoch, tensors, state, recipe)


def truncate(path):
    file = path / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def alter(path):
    content = bytearray((path / "adapters.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "adapters.safetensors").write_bytes(bytes(content))


def remove(path):
    (path / "state.json").unlink()


def garble_manifest(path):
    (path / "manifest.json").write_text('{"adapters.safete')


def remove_manifest(path):
    (path / "manifest.json").unlink()


DAMAGES = {
    truncate: "adapters.safetensors is altered or cut short",
    alter: "adapters.safetensors is altered or cut short",
    remove: "state.json is missing",
    garble_manifest: "manifest",
    remove_manifest: "manifest",
}
damaged = pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)


def test_tensors_and_state_go_round(tmp_path):
    path = write(tmp_path, 3)
    tensors, state = checkpoint.load(path)
    assert path == tmp_path / "epoch-000003" and checkpoint.damage(path) is None
    assert state == {"epoch": 3, "nested": {"x": [1.5]}}
    assert torch.equal(tensors["adapters"]["a/b.lora_A"], torch.full((2, 3), 3.0))
    assert tensors["adapters"]["half"].dtype == torch.bfloat16
    assert tensors["optimizer"]["0.step"].item() == 3 and tensors["optimizer"]["0.step"].shape == ()


def test_only_the_newest_are_kept(tmp_path):
    for epoch in range(1, 6):
        write(tmp_path, epoch, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-000004", "epoch-000005"]


OTHERS = ("epoch-zz-mine", "epoch-000001-backup", "epoch-2", "epoch-0000002", "epoch-99999\u0665", "epoch-000009.old")


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_name_is_neither_a_checkpoint_nor_deleted(tmp_path, name):
    shutil.copytree(write(tmp_path, 1), tmp_path / name)
    for epoch in range(2, 5):
        newest = write(tmp_path, epoch, keep=1)
        assert checkpoint.complete(tmp_path) == [newest]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "epoch-000004"])
    assert checkpoint.damage(tmp_path / name) is None
    assert checkpoint.choose(tmp_path, "auto", print) == newest
    assert checkpoint.expected_epoch(tmp_path, name) == checkpoint.expected_epoch(tmp_path, "auto") == 4
    with pytest.raises(InputError, match=f"checkpoint {name} is not in"):
        checkpoint.choose(tmp_path, name, print)


def test_a_copy_that_was_put_away_by_hand_stays_where_it_is(tmp_path):
    write(tmp_path, 1)
    kept = tmp_path / f".epoch-mine{checkpoint.AWAY}"
    shutil.copytree(tmp_path / "epoch-000001", kept)
    assert checkpoint.choose(tmp_path, "auto", print).name == "epoch-000001" and kept.is_dir()


def test_the_checkpoint_just_written_is_kept_beside_later_ones(tmp_path):
    """A run that continued from an earlier checkpoint must not lose what it writes."""
    for epoch in (7, 8, 9):
        write(tmp_path, epoch)
    assert write(tmp_path, 3, keep=1).is_dir()
    assert [path.name[-1] for path in checkpoint.complete(tmp_path)] == ["3", "9"]


def test_a_millionth_epoch_comes_after_the_one_before_it(tmp_path):
    for epoch in (999_999, 1_000_000):
        write(tmp_path, epoch, keep=1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["epoch-1000000"]
    assert checkpoint.expected_epoch(tmp_path, "auto") == 1_000_000


def test_saving_again_under_a_name_replaces_it(tmp_path):
    path = write(tmp_path, 1)
    (path / "extra").write_text("x")
    write(tmp_path, 1)
    assert not (path / "extra").exists() and checkpoint.damage(path) is None


def test_auto_takes_the_newest_and_warns_of_nothing(tmp_path):
    write(tmp_path, 9)
    newest = write(tmp_path, 10)
    warnings = []
    assert checkpoint.choose(tmp_path, "auto", warnings.append) == newest and not warnings


@damaged
def test_auto_names_a_damaged_one_and_takes_the_one_before(tmp_path, damage):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    damage(bad)
    warnings = []
    assert checkpoint.choose(tmp_path, "auto", warnings.append) == good
    assert len(warnings) == 1 and "epoch-000002" in warnings[0] and DAMAGES[damage] in warnings[0]


@damaged
def test_a_damaged_one_asked_for_by_name_is_refused(tmp_path, damage):
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    with pytest.raises(InputError, match="epoch-000002"):
        checkpoint.choose(tmp_path, "epoch-000002", print)


@damaged
def test_auto_never_starts_anew_when_every_one_is_damaged(tmp_path, damage):
    damage(write(tmp_path, 1))
    damage(write(tmp_path, 2))
    with pytest.raises(InputError, match="every checkpoint"):
        checkpoint.choose(tmp_path, "auto", lambda _: None)


def test_one_asked_for_by_name_is_taken(tmp_path):
    first = write(tmp_path, 1)
    write(tmp_path, 2)
    assert checkpoint.choose(tmp_path, "epoch-000001", print) == first


def test_a_missing_one_asked_for_by_name_is_refused_with_those_there(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(InputError, match=r"epoch-000007 is not in .*epoch-000001"):
        checkpoint.choose(tmp_path, "epoch-000007", print)


def test_never_and_nothing_there_start_anew(tmp_path):
    assert checkpoint.choose(tmp_path / "none", "auto", print) is None
    write(tmp_path, 1)
    assert checkpoint.choose(tmp_path, "never", print) is None


def test_what_a_crash_left_half_written_is_ignored(tmp_path):
    good = write(tmp_path, 1)
    staged = tmp_path / ".epoch-000002.staged"
    staged.mkdir()
    (staged / "manifest.json").write_text(json.dumps({}))
    assert checkpoint.complete(tmp_path) == [good]
    assert checkpoint.choose(tmp_path, "auto", print) == good
    assert checkpoint.damage(write(tmp_path, 2)) is None and not staged.exists()


def steps(model, optimizer, count):
    for step in range(count):
        model(torch.full((1, 4), step + 1.0)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_optimizer_goes_round_and_takes_the_same_next_steps(tmp_path):
    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01, fused=True) for model in models]
    steps(models[0], optimizers[0], 3)
    tensors = {"optimizer": checkpoint.optimizer_tensors(optimizers[0])}
    loaded, _ = checkpoint.load(checkpoint.save(tmp_path, 1, tensors, {}, CheckpointRecipe(keep=1)))
    models[1].load_state_dict(models[0].state_dict())
    checkpoint.load_optimizer(optimizers[1], loaded["optimizer"])
    for model, optimizer in zip(models, optimizers, strict=True):
        steps(model, optimizer, 2)
    assert torch.equal(models[0].weight, models[1].weight) and torch.equal(models[0].bias, models[1].bias)
    assert optimizers[1].state[models[1].weight]["step"] == 5


def test_every_nth_checkpoint_is_kept_beside_the_newest(tmp_path):
    for epoch in range(1, 12):
        write(tmp_path, epoch, keep=2, keep_every=4)
    assert [path.name[-2:] for path in checkpoint.complete(tmp_path)] == ["04", "08", "10", "11"]


def test_a_checkpoint_that_is_written_again_is_never_gone(tmp_path, monkeypatch):
    """A crash between taking the old one's name away and giving it to the new one leaves the old one."""
    first = write(tmp_path, 3)
    before = {path.name: path.read_bytes() for path in first.iterdir()}

    class Killed(BaseException):
        pass

    replace = os.replace

    def crash(source, target):
        if str(source).endswith(".staged"):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", crash)
        write(tmp_path, 3)
    assert checkpoint.complete(tmp_path) == []
    assert checkpoint.choose(tmp_path, "auto", print) == first
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    write(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-000003"]


def test_one_half_deleted_by_a_crash_is_not_taken_for_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    gone = write(tmp_path, 2)
    gone.rename(tmp_path / f".{gone.name}{checkpoint.AWAY}")
    (tmp_path / f".{gone.name}{checkpoint.AWAY}" / "state.json").unlink()
    assert checkpoint.choose(tmp_path, "auto", print).name == "epoch-000001"


def test_what_could_not_be_written_in_the_background_is_told_at_the_next_turn(tmp_path):
    writer = checkpoint.Writer()
    (tmp_path / "file").write_text("")
    given = ({"adapters": {"a": torch.ones(1)}}, {}, CheckpointRecipe())
    writer.submit(tmp_path / "file", 1, *given)
    with pytest.raises(InputError, match="cannot write checkpoint epoch-000001"):
        writer.wait()
    writer.submit(tmp_path / "run", 1, *given)
    writer.wait()
    assert [path.name for path in checkpoint.complete(tmp_path / "run")] == ["epoch-000001"]
