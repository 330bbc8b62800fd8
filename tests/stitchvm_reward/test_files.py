"""Files that are there whole or not at all."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from stitchvm_reward.errors import InputError
from stitchvm_reward.files import check_writable, staged, write_json


def test_a_file_takes_its_name_at_the_end_with_the_folders_it_needs(tmp_path):
    path = tmp_path / "deeper" / "file.txt"
    for content in ("old", "new"):
        with staged(path) as file:
            assert str(os.getpid()) in file.name and not file.exists()
            file.write_text(content)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == content and [*path.parent.iterdir()] == [path]
    assert [*tmp_path.iterdir()] == [path.parent]


def test_a_folder_takes_the_place_of_another(tmp_path):
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with staged(path) as folder:
            folder.mkdir()
            (folder / name).write_text("")
        assert [file.name for file in path.iterdir()] == [name] and [*tmp_path.iterdir()] == [path]


def test_files_can_be_read_by_whom_the_process_lets_read(tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    for wanted in (tmp_path / "file", tmp_path / "folder" / "file"):
        with staged(wanted if wanted.parent == tmp_path else wanted.parent) as new:
            file = new if wanted.parent == tmp_path else new / "file"
            file.parent.mkdir(exist_ok=True)
            save_file({"a": torch.zeros(2)}, file)
        assert wanted.stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_the_old_one_and_nothing_else(kind, tmp_path):
    path, inner = tmp_path / "out", tmp_path / "out" / "inner"
    if kind == "folder":
        path.mkdir()
    (inner if kind == "folder" else path).write_text("old")
    for wanted in (path, tmp_path / "deeper" / "out"):
        with pytest.raises(RuntimeError), staged(wanted) as new:
            if kind == "folder":
                new.mkdir()
            (new / "inner" if kind == "folder" else new).write_text("half")
            raise RuntimeError
    assert [*tmp_path.iterdir()] == [path] and (inner if kind == "folder" else path).read_text() == "old"


def test_what_a_killed_process_of_the_same_number_left_is_not_taken_up(tmp_path):
    left = tmp_path / f".out.{os.getpid()}.staged"
    left.mkdir()
    (left / "half").write_text("")
    with staged(tmp_path / "out") as folder:
        folder.mkdir()
    assert [*tmp_path.iterdir()] == [tmp_path / "out"] and not [*(tmp_path / "out").iterdir()]


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="out"), staged(tmp_path / "out") as file:
        file.write_text("")
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]


def test_json_ends_its_line_and_makes_its_folders(tmp_path):
    write_json(tmp_path / "deeper" / "found.json", {"a": [1]})
    text = (tmp_path / "deeper" / "found.json").read_text()
    assert json.loads(text) == {"a": [1]} and text.endswith("}\n")


def test_what_cannot_be_written_is_told_before_and_what_can_is_left_as_it_is(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "found.json", tmp_path / "file" / "deeper" / "found.json", tmp_path):
        for refuse in (check_writable, lambda path: write_json(path, {})):
            with pytest.raises(InputError, match=f"cannot write {path}: "):
                refuse(path)
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "deeper" / "found.json")
    assert [*tmp_path.iterdir()] == [tmp_path / "file"] and (tmp_path / "file").read_text() == "kept"
