"""A run that was stopped, killed or damaged ends bit for bit where an undisturbed one ends."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stitchvm_reward.errors import InputError
from stitchvm_reward.runs import checkpoint
from stitchvm_reward.runs.recipe import CheckpointRecipe
from stitchvm_reward.runs.tracking import Tracker

EPOCHS = 6
# Two optimizer steps an epoch, so that old differs from current; evaluations fall on the ends of both halves.
SETTINGS = ("train.updates_per_epoch=2", "evaluation.every=3")


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory):
    """The run that nothing disturbs."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(run, f"epochs={EPOCHS}", *SETTINGS)
    return run


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory):
    """The same run, stopped after three epochs."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    train(run, "epochs=3", *SETTINGS)
    return run


@pytest.fixture
def half(stopped, tmp_path):
    """A copy of the stopped run, to go on with or to damage."""
    return shutil.copytree(stopped, tmp_path / "run")


def exported(run):
    """The LoRA file's header, but for its date, and tensors; safetensors orders the entries as it pleases."""
    with safe_open(run / "lora.safetensors", "pt") as file:
        header = {name: text for name, text in file.metadata().items() if name != "modelspec.date"}
        return header, {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118


@pytest.fixture
def assert_equal(straight, digests, rows):
    """Compare a run with the undisturbed one: adapters, Adam's moments, counters, metrics and the exported file."""

    def check(run):
        assert digests(run, EPOCHS) == digests(straight, EPOCHS)
        assert rows(run) == rows(straight)
        same_file = exported(run) == exported(straight)  # compared apart: a report of the bytes would be endless
        assert same_file

    return check


def test_a_checkpoint_holds_three_different_adapters_and_both_moments_of_every_matrix(straight, adapters):
    tensors = adapters(straight, EPOCHS)
    by_adapter = {
        name: {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{name}/")}
        for name in ("current", "old", "ema")
    }
    current = by_adapter["current"]
    assert len(tensors) == 3 * len(current) and len(current) > 0
    for name in ("old", "ema"):
        assert by_adapter[name].keys() == current.keys()
        assert any(not torch.equal(by_adapter[name][key], current[key]) for key in current)
    moments = load_file(straight / "checkpoints" / f"epoch-{EPOCHS:06d}" / "optimizer.safetensors")
    for name in ("exp_avg", "exp_avg_sq"):
        found = [tensor for key, tensor in moments.items() if key.endswith(f".{name}")]
        assert len(found) == len(current)
        # The last block's text stream is dropped, so its queries (matrices A and B) have no gradient.
        assert sum(bool(tensor.abs().max() == 0) for tensor in found) == 2
    assert {float(value) for key, value in moments.items() if key.endswith(".step")} == {2.0 * EPOCHS}


def test_three_epochs_and_three_more_equal_six_bit_for_bit(half, train, assert_equal, capsys):
    train(half, f"epochs={EPOCHS}", *SETTINGS)
    assert "epoch-000003" in capsys.readouterr().out
    assert_equal(half)


def test_saving_right_after_loading_gives_the_same_checkpoint(half, make_trainer, digests):
    before = digests(half, 3)
    trainer = make_trainer(half, f"epochs={EPOCHS}", *SETTINGS)
    assert (trainer.epoch, trainer.learner.step) == (3, 6)
    trainer._save(trainer.learner.tensors(), trainer.state_dict())
    trainer.writer.wait()
    assert digests(half, 3) == before


def test_a_checkpoint_of_another_version_is_refused(half, make_trainer):
    folder = half / "checkpoints/epoch-000003"
    tensors, state = checkpoint.load(folder)
    state.pop("pending")
    checkpoint.save(half / "checkpoints", 3, tensors, state, CheckpointRecipe(keep=9))
    with pytest.raises(InputError, match=r"another version of this code \(it differs in pending\)"):
        make_trainer(half, f"epochs={EPOCHS}", *SETTINGS)


def test_other_text_encoders_than_the_run_began_with_are_refused(half, make_trainer):
    folder = half / "checkpoints/epoch-000003"
    tensors, state = checkpoint.load(folder)
    state["prompt_key"] = "another"
    checkpoint.save(half / "checkpoints", 3, tensors, state, CheckpointRecipe(keep=9))
    with pytest.raises(InputError, match=r"text encoders of .* are not those that this run began with"):
        make_trainer(half, f"epochs={EPOCHS}", *SETTINGS)


def test_running_a_finished_run_again_changes_nothing(half, train, digests, rows):
    before, file = (digests(half, 3), rows(half)), exported(half)
    train(half, "epochs=3", *SETTINGS)
    assert (digests(half, 3), rows(half)) == before
    same_file = exported(half) == file
    assert same_file


@pytest.mark.slow
def test_a_run_killed_at_a_random_moment_ends_where_an_undisturbed_one_ends(
    straight, command, assert_equal, tmp_path, record_property
):
    run, choice = tmp_path / "run", random.Random(20260519)
    timed = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()][1:]
    an_epoch = sum(value for row in timed for key, value in row.items() if key.startswith("seconds/")) / len(timed)
    after, wait = choice.randint(1, 3), choice.uniform(0, an_epoch)
    start = command(run, f"epochs={EPOCHS}", *SETTINGS)
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(start, stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 120
            while not (run / "checkpoints" / f"epoch-{after:06d}" / checkpoint.MANIFEST).exists():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.01)
            time.sleep(wait)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    newest = checkpoint.complete(run / "checkpoints")[-1].name
    record_property("killed_after", newest)
    print(f"killed {wait:.2f} s after checkpoint {after} was seen; the newest is {newest}")
    assert "epoch-000001" <= newest < f"epoch-{EPOCHS:06d}"

    again = subprocess.run(start, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert f"resumed from {run}/checkpoints/{newest}" in again.stdout
    assert list((run / "checkpoints").glob(".*")) == []
    assert_equal(run)


def cut_short(folder):
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return path.name


def one_bit_flipped(folder):
    path = folder / "adapters.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path.name


def file_lost(folder):
    (folder / "state.json").unlink()
    return "state.json"


@pytest.mark.parametrize("spoil", [cut_short, one_bit_flipped, file_lost])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(spoil, half, train, assert_equal, capsys):
    file = spoil(half / "checkpoints" / "epoch-000003")
    train(half, f"epochs={EPOCHS}", *SETTINGS)
    said = capsys.readouterr().out
    complaint = next(line for line in said.splitlines() if "damaged" in line)
    assert "epoch-000003" in complaint and file in complaint
    assert f"resumed from {half}/checkpoints/epoch-000002" in said
    assert_equal(half)


def test_when_every_checkpoint_is_damaged_the_run_is_refused_and_nothing_is_lost(half, make_trainer, rows):
    before = rows(half)
    for folder in checkpoint.complete(half / "checkpoints"):
        one_bit_flipped(folder)
    with pytest.raises(InputError, match=r"every checkpoint.*damaged"):
        make_trainer(half, f"epochs={EPOCHS}", *SETTINGS)
    assert rows(half) == before


def test_a_named_checkpoint_that_is_not_there_is_refused_with_those_that_are(half, make_trainer, rows):
    before = rows(half)
    with pytest.raises(InputError, match="epoch-000099") as refused:
        make_trainer(half, f"epochs={EPOCHS}", *SETTINGS, "checkpoint.resume=epoch-000099")
    message = str(refused.value)
    assert "epoch-000002, epoch-000003" in message and "\n" not in message
    assert rows(half) == before


def test_a_named_checkpoint_that_is_damaged_is_refused(half, make_trainer):
    one_bit_flipped(half / "checkpoints" / "epoch-000003")
    with pytest.raises(InputError, match=r"epoch-000003 is damaged: adapters\.safetensors"):
        make_trainer(half, f"epochs={EPOCHS}", *SETTINGS, "checkpoint.resume=epoch-000003")


def test_an_older_checkpoint_can_be_named_and_leads_to_the_same_end(half, train, assert_equal, capsys):
    train(half, f"epochs={EPOCHS}", *SETTINGS, "checkpoint.resume=epoch-000002")
    assert f"resumed from {half}/checkpoints/epoch-000002" in capsys.readouterr().out
    assert_equal(half)


@pytest.mark.slow
def test_resuming_within_the_warm_up_equals_never_having_stopped(train, digests, rows, tmp_path):
    settings = ("train.updates_per_epoch=2", "train.warmup=8", "evaluation.every=2")
    train(tmp_path / "a" / "run", "epochs=4", *settings)
    train(tmp_path / "b" / "run", "epochs=2", *settings)
    train(tmp_path / "b" / "run", "epochs=4", *settings)
    rates = [row["train/learning_rate"] for row in rows(tmp_path / "a" / "run")[1:]]
    assert all(earlier < later for earlier, later in zip(rates, rates[1:]))
    assert digests(tmp_path / "b" / "run", 4) == digests(tmp_path / "a" / "run", 4)
    assert rows(tmp_path / "b" / "run") == rows(tmp_path / "a" / "run")


@pytest.mark.parametrize("place", [(Tracker, "log"), (checkpoint, "save")], ids=["in logging", "in saving"])
def test_a_crash_at_the_end_of_an_epoch_loses_no_row_of_metrics(place, half, train, assert_equal, monkeypatch):
    """Whichever of checkpoint and metrics is written first, the run may die before the other."""
    holder, name = place
    original = getattr(holder, name)

    def dies(first, second, *rest, **named):
        if second in (4, "epoch-000004"):
            raise KeyboardInterrupt
        return original(first, second, *rest, **named)

    monkeypatch.setattr(holder, name, dies)
    with pytest.raises(KeyboardInterrupt):
        train(half, f"epochs={EPOCHS}", *SETTINGS)
    monkeypatch.undo()
    train(half, f"epochs={EPOCHS}", *SETTINGS)
    assert_equal(half)
