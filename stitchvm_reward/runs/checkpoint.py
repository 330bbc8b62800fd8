"""Checkpoints: folders that are either complete and verified or absent."""

import hashlib
import json
import os
import re
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
from stitchvm_reward.files import check_name, json_text, usual_mode
from stitchvm_reward.runs.recipe import CheckpointRecipe

MANIFEST = "manifest.json"
AWAY = ".away"


def _name(epoch: int) -> str:
    return f"epoch-{epoch:06d}"


def _epoch(name: str) -> int | None:
    """Return the epoch of a checkpoint's name; None for any other name, such as that of a copy that a user made."""
    number = name.removeprefix("epoch-")
    # The name must come out again: other spellings of a number are not ours either.
    return int(number) if re.fullmatch("[0-9]{6,18}", number) and name == _name(int(number)) else None


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
    """Write the checkpoint of an epoch from named tensor files and a JSON state, then delete outdated checkpoints.

    All files are written and synced in a temporary folder, the manifest of hashes last, and the folder is renamed. A
    crash at any moment leaves earlier checkpoints intact and no partial checkpoint under this name. Raises InputError
    if writing fails, for instance on a full disk.
    """
    name = _name(epoch)
    staged, final = folder / f".{name}.staged", folder / name
    try:
        _stage(staged, tensors, state)
        with _put_away(final):
            os.replace(staged, final)
            _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise InputError(
            f"cannot write checkpoint {name} into {folder}: {' '.join(str(error).split())}; the previous "
            "checkpoint is intact: make room and run again"
        ) from None
    for old in complete(folder)[: -recipe.keep]:
        # A run that continues from an earlier checkpoint writes names that are not the last ones in their order.
        outdated = not recipe.keep_every or (_epoch(old.name) or 0) % recipe.keep_every
        if old != final and outdated:
            with _put_away(old):
                pass
    return final


@contextmanager
def _put_away(path: Path) -> Iterator[None]:
    """Rename a checkpoint out of the way, and delete it once its replacement is in place."""
    away = path.with_name(f".{path.name}{AWAY}")
    shutil.rmtree(away, ignore_errors=True)
    if path.exists():
        os.replace(path, away)
    yield
    shutil.rmtree(away, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """Restore the names of checkpoints that a crash left renamed and without a replacement."""
    for away in folder.glob(f".epoch-*{AWAY}"):
        path = folder / away.name[1 : -len(AWAY)]
        if _epoch(path.name) is not None and not path.exists() and damage(away) is None:
            with suppress(OSError):  # another process of the run was faster
                os.replace(away, path)


class Writer:
    """Writes checkpoints in a background thread, one at a time, while training continues."""

    def __init__(self):
        self.thread, self.writing = ThreadPoolExecutor(1), None

    def submit(self, *given: Any) -> None:
        """Call `save` in the background; the tensors must not change any more. Raises what the previous call raised."""
        self.wait()
        self.writing = self.thread.submit(save, *given)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises InputError if it could not be written."""
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
    (staged / "state.json").write_text(json_text(state, indent=2))
    files = sorted(path for path in staged.iterdir())
    for path in files:
        _sync(path)
    manifest = {path.name: _digest(path) for path in files}
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=2))
    _sync(staged / MANIFEST)
    _sync(staged)


def complete(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first. Only complete checkpoints have their final name.

    Folders with other names, such as copies that a user made, are not checkpoints of the run.
    """
    found = [(epoch, path) for path in folder.glob("epoch-*") if (epoch := _epoch(path.name)) is not None]
    return [path for _, path in sorted(found) if path.is_dir()]


def damage(path: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if every file of its manifest is present with its hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    if not isinstance(manifest, dict) or not manifest:
        return "its manifest names no files"
    for name, expected in manifest.items():
        try:
            check_name("a name in its manifest", name)
        except InputError as error:
            return str(error)
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != expected:
            return f"{name} is altered or cut short"
    return None


def expected_epoch(folder: Path, resume: str) -> int:
    """Return the epoch that a run will probably continue from, by the names of its checkpoints; see `choose`."""
    names = [path.name for path in complete(folder)]
    name = "" if resume == "never" else resume if resume in names else (names or [""])[-1]
    return _epoch(name) or 0


def require_named(folder: Path, name: str) -> None:
    """Raise InputError if a folder has no checkpoint of that name, nor one that a crash left renamed."""
    names = [path.name for path in complete(folder)]
    if name not in names and (_epoch(name) is None or not (folder / f".{name}{AWAY}").is_dir()):
        raise InputError(f"checkpoint {name} is not in {folder}; existing checkpoints: {', '.join(names) or 'none'}")


def choose(folder: Path, resume: str, warn) -> Path | None:
    """Return the checkpoint to continue from, or None for a fresh start.

    `resume` is `never`, `auto` (the newest undamaged checkpoint; `warn` is called for each damaged one) or a name.
    Raises InputError if a named checkpoint is missing or damaged, or if all checkpoints are damaged.
    """
    if resume == "never":
        return None
    _put_back(folder)
    existing = complete(folder)
    if resume != "auto":
        require_named(folder, resume)
        path = folder / resume
        if (reason := damage(path)) is not None:
            raise InputError(f"checkpoint {path} is damaged: {reason}; choose another or use checkpoint.resume=auto")
        return path
    for path in reversed(existing):
        reason = damage(path)
        if reason is None:
            return path
        warn(f"checkpoint {path} is damaged: {reason}; trying the previous one")
    if existing:
        raise InputError(f"every checkpoint in {folder} is damaged; to start over, give another out=FOLDER")
    return None


def require_keys(state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise InputError where a checkpoint's state has other keys than this version of the code writes."""
    if different := sorted(state.keys() ^ expected.keys()):
        raise InputError(
            f"the checkpoint was written by another version of this code (it differs in {', '.join(different)}): "
            "continue with that version, or give another out=FOLDER"
        )


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the tensor files and the state of a checkpoint."""
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return tensors, json.loads((path / "state.json").read_text())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's per-parameter state, flat: INDEX.NAME, or INDEX.GROUP.NAME if nested (bitsandbytes)."""
    flat = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            for inner, entry in value.items() if isinstance(value, dict) else [(None, value)]:
                key = f"{index}.{name}" if inner is None else f"{index}.{name}.{inner}"
                # Parameters may share nested tensors (a table of 8-bit values); a file stores each separately.
                flat[key] = torch.tensor(entry) if not isinstance(entry, Tensor) else entry.clone() if inner else entry
    return flat


def load_optimizer(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Load a state that `optimizer_tensors` returned."""
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in flat.items():
        index, *groups, name = key.split(".")
        place = state.setdefault(int(index), {})
        for group in groups:
            place = place.setdefault(group, {})
        # A step counted in Python was stored as an integer scalar; torch counts steps in float tensors.
        place[name] = int(tensor) if tensor.ndim == 0 and tensor.dtype == torch.int64 else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
