"""Prompts: reading them through `datasets`, and which of them an epoch uses."""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.logging import disable_progress_bar, set_verbosity
from tqdm import tqdm

from nft.config import Recipe
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.errors import InputError, nearest
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.geometry import share
from stitchvm_reward.runs.rank_sync import RankSync

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
        raise InputError(f"{source} has no column {column!r} (prompts.column): {nearest(column, table.column_names)}")
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


def epoch_prompts(available: int, groups: int, seed: int, epoch: int) -> list[int]:
    """Return the prompt indices of an epoch's groups: an endless shuffle, with every prompt once per pass."""
    chosen = []
    for position in range(epoch * groups, (epoch + 1) * groups):
        passed, place = divmod(position, available)
        order = torch.randperm(available, generator=randomness.at(seed, randomness.PROMPTS, passed))
        chosen.append(int(order[place]))
    return chosen


def check_prompts(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return the training and the held-out prompts. Raises InputError where there are too few to evaluate on."""
    train = read_prompts(recipe.prompts.train, recipe.prompts.column, recipe.prompts.split)
    held_out = read_prompts(recipe.prompts.held_out, recipe.prompts.column, recipe.prompts.held_out_split)
    if len(held_out) < recipe.evaluation.samples:
        raise InputError(
            f"evaluation.samples is {recipe.evaluation.samples} but {recipe.prompts.held_out} holds "
            f"{len(held_out)} prompts; lower evaluation.samples or add prompts"
        )
    return train, held_out[: recipe.evaluation.samples]


def encode_prompts(recipe: Recipe, texts: list[str], ranks: RankSync) -> PromptCache:
    """Return a cache that holds what the network reads of every text; each process encodes its share.

    Raises InputError where the text encoders cannot be loaded.
    """
    accelerator = ranks.accelerator
    distinct = list(dict.fromkeys(texts))
    part = share(len(distinct), accelerator.process_index, accelerator.num_processes)

    def synced(batches: range) -> Iterator[int]:
        bar = tqdm(
            desc="encode prompts",
            total=len(batches),
            leave=False,
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )
        with bar:
            for start in ranks.rounds(batches):
                ranks.sync()
                if start is not None:
                    yield start
                    bar.update()

    with ranks.timings.phase("encode"):
        cache = PromptCache(recipe.model, recipe.prompts.cache, accelerator.device)
        with ranks.together():
            cache.ensure(distinct[part.start : part.stop], progress=synced)
    return cache
