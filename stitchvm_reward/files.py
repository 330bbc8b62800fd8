"""Writing files and folders atomically, results as JSON, and hashes of files."""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from stitchvm_reward.errors import InputError

NAME_LIMIT = 200  # bytes; file systems take 255, and a staged file's name is longer than its own

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]  # several machines may share a folder
_STAGED = re.compile(rf"\..+\.(?:{_HOST}-)?([0-9]+)\.staged")
# The mask can only be read by setting it, which is safe once, before there are threads.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def _nearest(path: Path) -> Path:
    """Return the nearest parent of a path that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def check_name(what: str, name: str) -> None:
    """Raise InputError unless `name`, which comes from a file, may become a part of a path or of a label in one.

    It is 1 to NAME_LIMIT bytes of printable characters without separators, and not `.` or `..`.
    """
    length = len(name.encode(errors="replace"))
    if not (0 < length <= NAME_LIMIT and name.isprintable() and name not in (".", "..") and not set(name) & set("/\\")):
        raise InputError(
            f"{what} becomes part of a path: it must be 1 to {NAME_LIMIT} printable bytes without / or \\, and not . "
            f"or .., got {name[:80]!r}" + (f"... ({length} bytes)" if len(name) > 80 else "")
        )


def check_path(what: str, path: str) -> None:
    """Raise InputError unless every part of a path that a recipe names is one that `check_name` accepts, or `..`."""
    for part in Path(path).parts:
        if part not in ("/", ".."):
            check_name(f"a folder in {what}", part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@cache
def _sweep(folder: Path) -> None:
    """Remove what processes of this machine that are gone have staged in a folder, once in a process.

    A cache may hold very many files: the folder is not listed for each of them. Staged files that name no machine are
    from earlier versions.
    """
    with suppress(OSError):  # a folder that cannot be listed
        for path in folder.iterdir():
            if (match := _STAGED.fullmatch(path.name)) and not _at_work(int(match[1])):
                _remove(path)


def _at_work(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def usual_mode(path: Path) -> None:
    """Give a file, or all files of a folder, the usual mode of new files.

    safetensors writes files that only their owner can read.
    """
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~_UMASK)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which is renamed to `path` at the end; parents are created then.

    An existing file or folder of that name is replaced. If the body raises, it is kept and nothing is left behind.
    What killed processes left beside it is removed, once in a process. Several processes may write the same name at
    once; the last one wins. Raises OSError if writing fails.
    """
    nearest = _nearest(path)
    process = os.getpid()
    temporary = nearest / f".{path.name}.{_HOST}-{process}.staged"
    # A killed process may have begun when the nearest parent was one further up, and may have had the id of this one.
    _sweep(nearest)
    _sweep(nearest.parent)
    for own in (temporary, nearest / f".{path.name}.{process}.staged"):
        _remove(own)
    try:
        yield temporary
        usual_mode(temporary)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and temporary.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content. A file of the hub's cache has it as its name and is not read."""
    target = path.resolve()
    if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name):
        return target.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(path: Path) -> None:
    """Raise InputError if a file cannot be written at `path`, as far as can be known in advance; nothing is changed."""
    try:
        if path.exists():
            path.open("a").close()
        else:
            with tempfile.TemporaryFile(dir=_nearest(path)):
                pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def nan_as_null(content: Any) -> Any:
    """Return content for JSON, which has no numbers that are not finite: they become None."""
    if isinstance(content, dict):
        return {name: nan_as_null(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [nan_as_null(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def json_text(content: Any, indent: int | None = None) -> str:
    """Return content as JSON; numbers that are not finite, which JSON does not have, become null."""
    return json.dumps(nan_as_null(content), indent=indent, allow_nan=False)


def null_as_nan(content: Any) -> Any:
    """Return measurements that `json_text` wrote, and in which null can only be a number that was not finite."""
    if isinstance(content, dict):
        return {name: null_as_nan(value) for name, value in content.items()}
    if isinstance(content, list):
        return [null_as_nan(value) for value in content]
    return math.nan if content is None else content


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, complete or not at all, and create its parent folders. Raises InputError if that fails.

    Numbers that are not finite become null.
    """
    try:
        with staged(path) as file:
            file.write_text(json_text(content, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
