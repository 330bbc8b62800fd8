"""Folders of cached files that several runs share: the least recently used files make room for new ones."""

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

GB = 10**9
HEX = "[0-9a-f]"
CACHED = f"{HEX * 2}/{HEX * 64}.safetensors"  # no other file in such a folder is touched


def cached_file(folder: Path, name: str) -> Path:
    """Return the path of a cached file; its name is a SHA-256 of what it depends on, in hexadecimal digits."""
    return folder / name[:2] / f"{name}.safetensors"


def mark_used(path: Path) -> bool:
    """Note that a cached file is used now; return whether it exists."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except PermissionError:  # a folder of another user, which can be read only
        return path.exists()
    return True


def make_room(folder: Path, limit: float, coming: float, keep: Collection[Path] = ()) -> int:
    """Remove the least recently used files of a cache folder until `coming` bytes more fit into `limit` bytes.

    Files in `keep` stay, even where the limit is exceeded. Returns how many files were removed. Another process may use
    the folder at the same time: a file that it uses while this one looks stays too.
    """
    files = []
    for path in folder.glob(CACHED):
        with suppress(FileNotFoundError):  # removed by another process
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    excess, removed, kept = sum(size for _, size, _ in files) + coming - limit, 0, set(keep)
    for used, size, path in sorted(files):
        if excess <= 0:
            break
        if path in kept:
            continue
        with suppress(FileNotFoundError, PermissionError):
            if path.stat().st_mtime_ns == used:
                path.unlink()
                excess, removed = excess - size, removed + 1
    return removed
