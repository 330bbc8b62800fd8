"""What a run reads anew whenever it starts, and must find unchanged: prompts and value models."""

import hashlib
from pathlib import Path

from nft.config import Recipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.files import content_digest
from stitchvm_reward.prompts import read_prompts


def _of_prompts(source: str, column: str, split: str) -> str:
    return hashlib.sha256("\0".join(read_prompts(source, column, split)).encode()).hexdigest()


def _of_folder(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256("".join(f"{path.name}:{content_digest(path)};" for path in files).encode()).hexdigest()


def input_digests(recipe: Recipe) -> dict[str, str]:
    """Return a SHA-256 of the contents of each input by its recipe key; the value models must be there.

    All held-out prompts count, so a continuation may evaluate on more or fewer of them.
    """
    prompts = recipe.prompts
    found = {
        "prompts.train": _of_prompts(prompts.train, prompts.column, prompts.split),
        "prompts.held_out": _of_prompts(prompts.held_out, prompts.column, prompts.held_out_split),
    }
    values = (reward for reward in recipe.rewards if reward.kind == "value")
    return found | {f"rewards.{reward.name}": _of_folder(Path(reward.value_model).expanduser()) for reward in values}


def require_unchanged(recipe: Recipe, saved: dict[str, str], now: dict[str, str]) -> None:
    """Raise InputError for an input whose digest is another one than that which was `saved`."""
    sources = {"prompts.train": recipe.prompts.train, "prompts.held_out": recipe.prompts.held_out}
    sources |= {f"rewards.{reward.name}": reward.value_model for reward in recipe.rewards}
    for key, digest in now.items():
        if saved.get(key) != digest:
            raise InputError(
                f"the contents of {key} ({sources[key]}) are not those that this run began with: put them back, or "
                "give another out=FOLDER"
            )
