"""The run folder: created, checked for another run, and never overwritten."""

import fcntl
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from stitchvm_reward.errors import InputError
from stitchvm_reward.files import staged
from stitchvm_reward.runs import checkpoint
from stitchvm_reward.runs.recipe import dump

# Keys that may differ between a run and its continuation: they do not change what the run computes.
FREE = ("out", "epochs", "timeout", "tracking", "checkpoint.", "evaluation.", "prompts.cache", "data.cache")


def arm_of(name: str) -> str:
    """Return a run's name without its trailing -seedN: runs that differ only in the seed are one arm."""
    return re.sub(r"-seed\d+$", "", name)


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(content, dict):
        return {k: v for key, value in content.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): content}


def _difference(saved: str, recipe: Any) -> str | None:
    """Describe the first key in which a saved recipe differs from this one, with both values; None if none does.

    Raises ValueError for a saved recipe that is empty or not a mapping.
    """
    theirs, ours = (OmegaConf.to_container(OmegaConf.create(text)) for text in (saved, dump(recipe)))
    if not theirs or not isinstance(theirs, dict):
        raise ValueError("a recipe must hold keys")
    theirs, ours = _flat(theirs), _flat(ours)
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key) and not key.startswith(FREE):
            return f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
    return None


def check_run_folder(recipe: Any) -> Path:
    """Return the run folder, `recipe.out`. Raises InputError unless a run can start or continue there.

    The recipe may be of any kind that has the fields `out` and `checkpoint.resume`.
    """
    folder = Path(recipe.out).expanduser()
    saved = folder / "recipe.yaml"
    if saved.is_file():
        if recipe.checkpoint.resume == "never":
            raise InputError(f"{folder} already holds a run; give another out=FOLDER, or checkpoint.resume=auto")
        try:
            difference = _difference(saved.read_text(), recipe)
        except (ValueError, YAMLError, OmegaConfBaseException):
            raise InputError(f"{saved} is damaged: it is not known which run {folder} holds; move it away") from None
        if difference is not None:
            raise InputError(f"{folder} holds a run of a different recipe: {difference}; give another out=FOLDER")
    if (named := recipe.checkpoint.resume) not in ("auto", "never"):
        checkpoint.require_named(folder / "checkpoints", named)
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"cannot write the run folder {folder}: {error.strerror or error}") from None
    return folder


def _claim(folder: Path) -> TextIO:
    """Lock a run folder for this process. The system releases the lock when the process ends, however it ends."""
    file = (folder / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of the two depends on the system
        file.seek(0)
        raise InputError(
            f"another run is writing {folder} ({file.read().strip() or 'unknown process'}): wait for it, or give "
            "another out=FOLDER"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def prepare_run_folder(recipe: Any) -> TextIO:
    """Create and lock the run folder; `write_recipe` is to follow once the run has everything that it needs.

    The lock is held until the process ends or the returned file is closed. Raises InputError if another run holds it
    or the folder cannot be written.
    """
    folder = check_run_folder(recipe)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _claim(folder)
    except OSError as error:
        raise InputError(f"cannot write the run folder {folder}: {error.strerror or error}") from None


def write_recipe(recipe: Any) -> None:
    """Write the resolved recipe into the run folder, which then belongs to this run. Raises InputError if that fails.

    A start that fails must not have come this far: the recipe would stand in the way of the corrected one.
    """
    folder, text = Path(recipe.out).expanduser(), dump(recipe)
    try:
        with staged(folder / "recipe.yaml") as path:
            path.write_text(text)
    except OSError as error:
        raise InputError(f"cannot write the run folder {folder}: {error.strerror or error}") from None
