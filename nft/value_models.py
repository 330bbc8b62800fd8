"""Value models that a recipe names and that are not built yet."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from nft.config import Recipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.runs.rank_sync import RankSync, Stopped
from stitchvm_reward.stitching.build import build_value_model
from stitchvm_reward.stitching.config import StitchRecipe, load_stitch_recipe
from stitchvm_reward.stitching.plan import plan_lines

FOLDER = "value_model"  # launch/stitch.py writes it into its run folder


def to_build(reward: RewardRecipe) -> StitchRecipe | None:
    """Return the recipe by which a reward's value model is built; None where there is nothing to build.

    Raises InputError where the value model is missing and `stitch` is missing or does not fit.
    """
    folder = Path(reward.value_model).expanduser()
    if reward.kind != "value" or folder.is_dir():
        return None
    if not reward.stitch:
        raise InputError(
            f"value model not found: {reward.value_model}; name the recipe that builds it as the reward's stitch, such "
            "as recipes/stitch/sd35m_aesthetic.yaml, or build it with accelerate launch launch/stitch.py RECIPE"
        )
    if folder.name != FOLDER:
        raise InputError(
            f"value model not found: {reward.value_model}; to be built by {reward.stitch} it must be called "
            f"OUT/{FOLDER}, where OUT is the run folder of the build"
        )
    return replace(load_stitch_recipe(reward.stitch), out=str(folder.parent))


def missing(recipe: Recipe) -> dict[str, StitchRecipe]:
    """Return the recipes of the value models that a run has to build, by folder. Raises InputError."""
    found = {reward.value_model: to_build(reward) for reward in recipe.rewards if reward.kind == "value"}
    return {folder: stitch for folder, stitch in found.items() if stitch is not None}


def build_plan(recipe: Recipe) -> list[str]:
    """Return what a run will build before it trains: one line for each value model, and what it costs."""
    files = {reward.value_model: reward.stitch for reward in recipe.rewards}
    return [
        line
        for folder, stitch in missing(recipe).items()
        for line in (f"value model  {folder} is missing: built first, by {files[folder]}", *plan_lines(stitch))
    ]


def build_missing(recipe: Recipe, ranks: RankSync, write: Callable[[str], None]) -> None:
    """Build the missing value models on all processes of a run; a build that was interrupted goes on.

    Raises InputError, and Stopped after a signal to any process.
    """
    if ranks.accelerator.is_main_process and (lines := build_plan(recipe)):
        write("\n".join(lines))
    with ranks.together():
        stitches = missing(recipe)  # by every process before the first of them writes a folder
    for folder, stitch in stitches.items():
        try:
            build_value_model(stitch, ranks)
        except Stopped as stopped:
            raise Stopped(f"{stopped} of {folder}") from None
    if stitches:  # what trains next needs the memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
