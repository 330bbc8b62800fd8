"""Checks of a stitching recipe that need no weights."""

import json
from pathlib import Path

from stitchvm_reward.errors import InputError
from stitchvm_reward.families import architecture_of
from stitchvm_reward.hub import is_hub_id, locate
from stitchvm_reward.rewards.clip import require_folder
from stitchvm_reward.runs.recipe import require
from stitchvm_reward.runs.run_folder import check_run_folder
from stitchvm_reward.stitching.config import StitchRecipe
from stitchvm_reward.stitching.generate import check_generation
from stitchvm_reward.stitching.images import find_images
from stitchvm_reward.stitching.value_model import check_block


def check_stitch_recipe(recipe: StitchRecipe) -> None:
    """Check everything that needs no weights. Raises InputError."""
    check_run_folder(recipe)
    check_block(architecture_of(recipe.model.path), recipe.backbone.block)
    require_folder(recipe.reward.model)
    if not is_hub_id(recipe.reward.model):
        config = locate(recipe.reward.model, ()) / "config.json"
        try:
            blocks = int(json.loads(config.read_text())["vision_config"]["num_hidden_layers"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{recipe.reward.model} is not a CLIP model folder: config.json has no vision_config"
            ) from None
        for name, value in (
            ("search.last_reward_block", recipe.search.last_reward_block),
            ("reward.block", recipe.reward.block or 1),
        ):
            if value > blocks:
                raise InputError(f"{name} must be at most {blocks}, the reward model's number of blocks, got {value}")
    if recipe.reward.head and not is_hub_id(recipe.reward.head) and not Path(recipe.reward.head).expanduser().exists():
        raise InputError(f"aesthetic head not found: {recipe.reward.head}; give a file, a folder or a hub id")
    drawn, needed = recipe.data.generate.images, needed_images(recipe)
    if drawn:
        require(
            drawn >= needed,
            f"data.generate.images must be at least {needed}: the held-out images, and the search's or one batch",
            drawn,
        )
        check_generation(recipe)
    elif Path(recipe.data.images).expanduser().exists() or not is_hub_id(recipe.data.images):
        find_images(recipe.data.images, "", "", "", recipe.data.limit)


def needed_images(recipe: StitchRecipe) -> int:
    """Return the least number of images: those held out, and the search's or one batch."""
    return recipe.data.held_out + max(recipe.finetune.batch, recipe.search.probe + recipe.search.held_out)
