"""What can be known to fail before any weight is loaded, is found here."""

from pathlib import Path

from nft.config import Recipe
from nft.trainer import check_prompts
from stitchvm_reward.errors import InputError
from stitchvm_reward.hub import locate
from stitchvm_reward.rewards import find_function
from stitchvm_reward.runs.run_folder import check_run_folder


def _check_model(model: str, parts: tuple[str, ...]) -> None:
    """Raise InputError for a local model folder that is missing or lacks a part; hub ids are met on loading."""
    if model.count("/") == 1 and not model.startswith((".", "~", "/")) and not Path(model).exists():
        return
    folder = locate(model, parts)
    for part in parts:
        if not (folder / part).exists():
            raise InputError(f"{folder} lacks {part}; a model folder must have {', '.join(parts)}")


def check_recipe(recipe: Recipe) -> None:
    """Check everything of a recipe that does not need its weights. Raises InputError."""
    check_run_folder(recipe)
    _check_model(
        recipe.model.path, ("model_index.json", "transformer", "vae", "scheduler", "text_encoder", "tokenizer")
    )
    for reward in recipe.rewards:
        if reward.kind == "function":
            find_function(reward.function)
            continue
        _check_model(reward.model, ("config.json",))
        if reward.head and not Path(reward.head).expanduser().exists() and reward.head.count("/") != 1:
            raise InputError(f"aesthetic head not found: {reward.head}; give a file, a folder or a hub id")
    for name in recipe.evaluation.metrics:
        find_function(name)
    check_prompts(recipe)
