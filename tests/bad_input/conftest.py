"""What the tests of bad input share: a command that must answer in one line and leave everything as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest


def tree(folder: Path) -> dict[Path, bytes | None]:
    """Return the content of everything in a folder; None for a folder or a link."""
    paths = sorted(folder.rglob("*"))
    return {path: path.read_bytes() if path.is_file() and not path.is_symlink() else None for path in paths}


@pytest.fixture
def refused(launched, tmp_path) -> Callable[..., str]:
    """refused("export", argument, ...) -> the one line of a command that exits with 2 and changes nothing."""

    def run(name: str, *arguments: object) -> str:
        before = tree(tmp_path)
        code, _, stderr = launched(name, *arguments)
        lines = stderr.splitlines()
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, stderr)
        assert tree(tmp_path) == before
        return lines[0]

    return run
