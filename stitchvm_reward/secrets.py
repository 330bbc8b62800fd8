"""Secrets of the environment, which must not get into files that people pass on."""

import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from stitchvm_reward.errors import InputError

NAMES = re.compile("(TOKEN|API_?KEY|(ACCESS|SECRET|PRIVATE)_?KEY|SECRET|PASSWORD|PASSPHRASE|CREDENTIALS?)$", re.I)
SHORTEST = 8  # characters; shorter values, such as `true` and `none`, are in any text by chance


def secrets(more: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return the values of the environment's variables that hold secrets, such as HF_TOKEN, and `more`, by name."""
    named = {name: value for name, value in os.environ.items() if NAMES.search(name)} | dict(more)
    return {name: value for name, value in named.items() if len(value) >= SHORTEST}


def refuse_secrets(text: str, where: str) -> None:
    """Raise InputError, which does not show it, if a text contains the value of a secret; `where` names the text."""
    for name, value in secrets().items():
        if value in text:
            raise InputError(
                f"{where} must not contain secrets: the value of the environment variable {name} is in it; remove it, "
                "and let the code that needs it read the variable itself"
            )


def refuse_secrets_in(folder: Path, more: Mapping[str, str]) -> None:
    """Raise InputError if a file of a folder contains a secret; `more` are secrets beside the environment's, by name.

    Files are searched whole, of any kind: safetensors files have headers of text.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for name, value in secrets(more).items():
                if content.find(value.encode(errors="surrogateescape")) >= 0:
                    raise InputError(
                        f"{path} must not contain secrets: the value of {name} is in it; nothing was uploaded"
                    )
