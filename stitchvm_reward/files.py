"""Files that are there whole or not at all, and figures as JSON."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stitchvm_reward.errors import InputError

# It can only be read by setting it: once, before there are threads.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def _nearest(path: Path) -> Path:
    """The nearest of a path's parents that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def usual_mode(path: Path) -> None:
    """Give a file, or all files of a folder, the mode of any new file: safetensors leaves its own to their owner alone,
    whose group could not load them."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~_UMASK)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder at, which gets its name, `path`, at the end; parents are made then.

    It takes the place of a file or folder of that name. Where anything raises, that one stays and nothing is left
    behind. Processes may write the same name at once: the last one's stays. Raises OSError where it cannot be written.
    """
    beside = _nearest(path) / f".{path.name}.{os.getpid()}.staged"
    try:
        # A process that was killed may have had this one's number.
        _remove(beside)
        yield beside
        usual_mode(beside)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and beside.is_dir():
            shutil.rmtree(path)
        os.replace(beside, path)
    finally:
        _remove(beside)


def check_writable(path: Path) -> None:
    """Raise InputError where a file cannot be written at `path`, as far as that is known before; nothing is changed."""
    try:
        if path.exists():
            path.open("a").close()
        else:
            with tempfile.TemporaryFile(dir=_nearest(path)):
                pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def write_json(path: Path, content: Any) -> None:
    """Write JSON, and the folders that it needs. Raises InputError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
