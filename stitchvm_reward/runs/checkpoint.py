"""Checkpoints: a folder that is either complete and verified, or not there."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stitchvm_reward.errors import InputError
from stitchvm_reward.files import usual_mode
from stitchvm_reward.runs.recipe import CheckpointRecipe

MANIFEST = "manifest.json"
AWAY = ".away"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(
    folder: Path, epoch: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], recipe: CheckpointRecipe
) -> Path:
    """Write the checkpoint of an epoch from named tensor files and a JSON state, then drop those that need not be kept.

    Everything is staged and synced beside it, the manifest of hashes written last, and the folder renamed: a
    crash at any moment leaves the earlier checkpoints whole and no half of this one under its name. Raises InputError
    where it cannot be written, such as on a full disk.
    """
    name = f"epoch-{epoch:06d}"
    staged, final = folder / f".{name}.staged", folder / name
    try:
        _stage(staged, tensors, state)
        with _put_away(final):
            os.replace(staged, final)
            _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise InputError(
            f"cannot write checkpoint {name} into {folder}: {' '.join(str(error).split())}; the one before it is "
            "whole: make room and run again"
        ) from None
    for old in complete(folder)[: -recipe.keep]:
        if not recipe.keep_every or int(old.name[-6:]) % recipe.keep_every:
            with _put_away(old):
                pass
    return final


@contextmanager
def _put_away(path: Path) -> Iterator[None]:
    """Take a checkpoint's name from it, and delete it once what takes its place is there."""
    away = path.with_name(f".{path.name}{AWAY}")
    shutil.rmtree(away, ignore_errors=True)
    if path.exists():
        os.replace(path, away)
    yield
    shutil.rmtree(away, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """Give checkpoints their names again that a crash left put away with nothing in their place."""
    for away in folder.glob(f".epoch-*{AWAY}"):
        path = folder / away.name[1 : -len(AWAY)]
        if not path.exists() and damage(away) is None:
            with suppress(OSError):  # another process of the run has done it meanwhile
                os.replace(away, path)


class Writer:
    """Writes checkpoints in a thread, one after the other, while the training goes on."""

    def __init__(self):
        self.thread, self.writing = ThreadPoolExecutor(1), None

    def submit(self, *given: Any) -> None:
        """`save` in the background what must not change any more. Raises what the one before it raised."""
        self.wait()
        self.writing = self.thread.submit(save, *given)

    def wait(self) -> None:
        """Wait for the last one to be on disk. Raises InputError where it could not be written."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()


def _stage(staged: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for stem, content in tensors.items():
        flat = {key: tensor.detach().cpu().contiguous() for key, tensor in content.items()}
        save_file(flat, staged / f"{stem}.safetensors")
    usual_mode(staged)
    (staged / "state.json").write_text(json.dumps(state, indent=2))
    files = sorted(path for path in staged.iterdir())
    for path in files:
        _sync(path)
    manifest = {path.name: _digest(path) for path in files}
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=2))
    _sync(staged / MANIFEST)
    _sync(staged)


def complete(folder: Path) -> list[Path]:
    """Checkpoints that were given their name, which happens only once they are complete; oldest first."""
    return sorted(path for path in folder.glob("epoch-*") if path.is_dir())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of its manifest is there with its hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    if not isinstance(manifest, dict) or not manifest:
        return "its manifest names no files"
    for name, expected in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != expected:
            return f"{name} is altered or cut short"
    return None


def choose(folder: Path, resume: str, warn) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start.

    `resume` is `never`, `auto` (the newest undamaged one; each damaged one is named through `warn`), or a name.
    Raises InputError when a named one is missing or damaged, or when every one there is damaged.
    """
    if resume == "never":
        return None
    _put_back(folder)
    found = complete(folder)
    if resume != "auto":
        path = folder / resume
        if path not in found:
            names = ", ".join(other.name for other in found) or "none"
            raise InputError(f"checkpoint {resume} is not in {folder} (there: {names})")
        if (reason := damage(path)) is not None:
            raise InputError(f"checkpoint {path} is damaged: {reason}; choose another or use checkpoint.resume=auto")
        return path
    for path in reversed(found):
        reason = damage(path)
        if reason is None:
            return path
        warn(f"checkpoint {path} is damaged: {reason}; trying the one before it")
    if found:
        raise InputError(f"every checkpoint in {folder} is damaged; to start anew, give another out=FOLDER")
    return None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensor files and the state of a checkpoint."""
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return tensors, json.loads((path / "state.json").read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's per-parameter state, flat: INDEX.NAME, or INDEX.GROUP.NAME where it nests (bitsandbytes does)."""
    flat = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            for inner, entry in value.items() if isinstance(value, dict) else [(None, value)]:
                key = f"{index}.{name}" if inner is None else f"{index}.{name}.{inner}"
                # What nests may be shared between parameters (a table of 8-bit values); a file holds each by itself.
                flat[key] = torch.tensor(entry) if not isinstance(entry, Tensor) else entry.clone() if inner else entry
    return flat


def load_optimizer(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in flat.items():
        index, *groups, name = key.split(".")
        place = state.setdefault(int(index), {})
        for group in groups:
            place = place.setdefault(group, {})
        # A step that was counted in Python is a whole number of no dimension; torch's own is a float tensor.
        place[name] = int(tensor) if tensor.ndim == 0 and tensor.dtype == torch.int64 else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
