"""Folders of cached files make room."""

import os

from stitchvm_reward.cache_folder import cached_file, make_room, mark_used


def file(folder, name: str):
    return cached_file(folder, name * 64)


def fill(folder, names: str) -> None:
    for age, name in enumerate(reversed(names)):
        path = file(folder, name)
        path.parent.mkdir()
        path.write_bytes(b"0" * 100)
        os.utime(path, (1_000_000 - age, 1_000_000 - age))


def left(folder) -> str:
    return "".join(sorted(path.stem[0] for path in folder.rglob("*.safetensors")))


def test_the_least_recently_used_files_go_and_only_as_many_as_needed(tmp_path):
    fill(tmp_path, "abcdef")
    assert make_room(tmp_path, 600, 0) == 0 and left(tmp_path) == "abcdef"
    assert mark_used(file(tmp_path, "b"))
    assert make_room(tmp_path, 600, 150) == 2 and left(tmp_path) == "bdef"


def test_files_that_are_needed_stay_even_beyond_the_limit(tmp_path):
    fill(tmp_path, "abcd")
    keep = {file(tmp_path, name) for name in "ac"}
    assert make_room(tmp_path, 100, 0, keep) == 2 and left(tmp_path) == "ac"


def test_a_file_that_is_used_or_removed_by_another_process_meanwhile_is_left_alone(tmp_path, monkeypatch):
    fill(tmp_path, "abc")
    paths = sorted(tmp_path.rglob("*.safetensors"))

    def meanwhile(files):
        mark_used(paths[0])
        paths[1].unlink()
        return sorted(files, reverse=False)

    monkeypatch.setattr("stitchvm_reward.cache_folder.sorted", meanwhile, raising=False)
    assert make_room(tmp_path, 200, 0) == 1 and left(tmp_path) == "a"


def test_a_missing_file_is_not_used_and_a_missing_folder_is_empty(tmp_path):
    assert not mark_used(tmp_path / "none") and make_room(tmp_path / "none", 1, 1) == 0


def test_files_that_are_not_of_the_cache_are_never_removed(tmp_path):
    for name in ("adapters.safetensors", "aa/model.safetensors", "run/lora.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0" * 100)
    assert make_room(tmp_path, 1, 0) == 0 and len(left(tmp_path)) == 3
