"""What a run reads anew whenever it starts, and must find unchanged: prompts and value models."""

import hashlib
from pathlib import Path

from nft.config import Recipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.files import content_digest


def _of_prompts(prompts: list[str]) -> str:
    return hashlib.sha256("\0".join(prompts).encode()).hexdigest()


def _of_folder(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return hashlib.sha256("".join(f"{path.name}:{content_digest(path)};" for path in files).encode()).hexdigest()


def input_digests(recipe: Recipe, train: list[str], held_out: list[str]) -> dict[str, str]:
    """Return a SHA-256 of the contents of each input by its recipe key; the value models must be there.

    `train` and `held_out` are all prompts of the recipe, so that a continuation may evaluate on more or fewer of them.
    """
    found = {"prompts.train": _of_prompts(train), "prompts.held_out": _of_prompts(held_out)}
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
