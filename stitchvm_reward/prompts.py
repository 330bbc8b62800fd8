"""Prompts from text files, tables and data sets on the hub, read through `datasets`."""

import logging
from pathlib import Path

from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.logging import disable_progress_bar, set_verbosity

from stitchvm_reward.errors import InputError, nearest

READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_prompts(source: str, column: str, split: str) -> list[str]:
    """Return the prompts of a file, of a file on the hub (hf://datasets/owner/name/file.json) or of a data set there.

    They keep their order; blank ones are left out.

    Raises InputError for a missing, empty, unreadable or non-UTF-8 file, or a missing column.
    """
    path = Path(source).expanduser()
    reader = READERS.get(path.suffix)
    if reader is not None and source.startswith("hf://"):
        return _from_table(source, reader, source, column, split)
    if reader is None and (path.exists() or source.count("/") != 1):
        raise InputError(f"prompts must be a {', '.join(READERS)} file or a hub data set owner/name, got {source}")
    if reader is not None and not path.is_file():
        raise InputError(f"prompt file not found: {path}")
    if reader in ("text", "json", "csv"):
        _check_text(path)
    return _from_table(source, reader, str(path), column, split)


def _from_table(source: str, reader: str | None, files: str, column: str, split: str) -> list[str]:
    disable_progress_bar()
    set_verbosity(logging.CRITICAL)  # the error below says it in one line
    try:
        if reader is None:
            table = load_dataset(source, split=split)
        else:
            table = load_dataset(reader, data_files=files, split="train")
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise InputError(f"data set {source} cannot be loaded: {str(error).splitlines()[0]}") from None
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"{source} cannot be read as {reader or 'a data set'}: {reason}") from None
    column = "text" if reader == "text" else column
    if column not in table.column_names:
        raise InputError(f"{source} has no column {column!r} of prompts: {nearest(column, table.column_names)}")
    # Some editors begin a UTF-8 file with a byte order mark.
    prompts = [prompt.removeprefix("\ufeff") for prompt in table[column] if isinstance(prompt, str) and prompt.strip()]
    if not prompts:
        raise InputError(f"{source} holds no prompts")
    return prompts


def _check_text(path: Path) -> None:
    content = path.read_bytes()
    if not content.strip():
        raise InputError(f"{path} holds no prompts")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
