"""What a command writes is complete or absent, also where it is killed, the disk is full, or the start fails."""

import os
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from nft.evaluation.sample import write_pictures
from stitchvm_reward.errors import InputError
from stitchvm_reward.files import staged, write_json
from stitchvm_reward.runs.pictures import picture_grid, save_figure
from tests.tiny import RECIPE

IMAGES = torch.rand(2, 3, 16, 16)
WRITERS = {
    "grid": lambda path: picture_grid({"base": IMAGES}, ["one", "two"], path),
    "pictures": lambda path: write_pictures({"base": IMAGES[:1]}, path.parent),
    "figure": lambda path: save_figure(Figure(), path),
    "json": lambda path: write_json(path, {"a": [1] * 10_000}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_no_other(monkeypatch, tmp_path, kind):
    path = tmp_path / "0000-base.png"
    WRITERS[kind](path)
    before = path.read_bytes()
    assert before

    def full(self, target):
        (target if hasattr(target, "parent") else path.with_name(target)).touch()
        raise OSError(28, "No space left on device")

    # The last step of every writer: whatever was written before it is still beside the old file.
    monkeypatch.setattr("stitchvm_reward.files.os.replace", lambda source, target: full(None, source))
    with pytest.raises((InputError, OSError), match="No space left"):
        WRITERS[kind](path)
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == before


def test_pictures_are_png_whatever_their_names(tmp_path):
    WRITERS["grid"](tmp_path / "new" / "grid.PNG")
    WRITERS["pictures"](tmp_path / "0000-base.png")
    for path in (tmp_path / "new" / "grid.PNG", tmp_path / "0000-base.png"):
        assert Image.open(path).format == "PNG"


def test_a_figure_of_an_unknown_format_is_told_in_one_line(tmp_path):
    save_figure(Figure(), tmp_path / "plot.PDF")
    with pytest.raises(InputError, match=r"cannot write .*plot.xyz: Format 'xyz' is not supported"):
        save_figure(Figure(), tmp_path / "plot.xyz")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.PDF"]


KILLED = """
import os, signal, sys
from pathlib import Path
from stitchvm_reward.files import staged
with staged(Path(sys.argv[1])) as out:
    if sys.argv[2] == "folder":
        out.mkdir()
    (out / "half" if sys.argv[2] == "folder" else out).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("made", [False, True], ids=["parent missing", "parent there"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_killed_command_staged_is_gone_after_the_next_one(tmp_path, kind, made):
    out = tmp_path / "export" / "comfy[ui]"
    if made:
        out.parent.mkdir()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), kind])
    assert killed.returncode == -9 and list(tmp_path.rglob("*.staged"))
    out.parent.mkdir(exist_ok=True)  # by another export in between
    with staged(out) as new:
        new.write_text("whole")
    assert [*tmp_path.iterdir()] == [out.parent] and [*out.parent.iterdir()] == [out]


def test_what_others_are_staging_stays(tmp_path):
    (tmp_path / f".out.{os.getppid()}.staged").write_text("of a process at work")
    (tmp_path / ".out.0badbeef-1.staged").write_text("of another machine")
    (tmp_path / ".out.mine.staged").write_text("of a user")
    before = sorted(tmp_path.iterdir())
    with staged(tmp_path / "out") as outer:
        outer.mkdir()
        with staged(outer / "out") as inner:  # of the same name, one further down
            inner.write_text("inner")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"])
    assert (tmp_path / "out" / "out").read_text() == "inner"


def test_a_missing_checkpoint_is_told_before_the_run_folder_is_made(refused, tmp_path):
    line = refused("nft", RECIPE, f"out={tmp_path}/run", "checkpoint.resume=epoch-000007")
    assert "checkpoint epoch-000007 is not in" in line and "existing checkpoints: none" in line


def test_a_start_that_fails_leaves_no_recipe_in_the_way(make_trainer, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr("nft.trainer.checkpoint.choose", lambda *_: (_ for _ in ()).throw(InputError("it cannot resume")))
        with pytest.raises(InputError, match="it cannot resume"):
            make_trainer(tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    make_trainer(tmp_path / "run", "train.beta=.5").claim.close()
    assert "beta: 0.5" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_missing_captions_leave_no_run_folder(stitch, image_folder, tmp_path):
    (image_folder / "00003.txt").rename(tmp_path / "00003.txt")
    try:
        with pytest.raises(InputError, match=r"00003.png has no caption: 00003.txt is missing"):
            stitch("aesthetic", tmp_path / "run", "backbone.conditioning=prompt", "backbone.block=2", "reward.block=1")
    finally:
        (tmp_path / "00003.txt").rename(image_folder / "00003.txt")
    assert not (tmp_path / "run").exists()
