"""Checks of a recipe that need no weights, so that a run that must fail does so before anything is loaded."""

from importlib.util import find_spec
from pathlib import Path

import torch

from nft.config import Recipe
from nft.export.lora import read_lora
from nft.objectives import objective_class
from nft.prompts import check_prompts
from nft.value_models import to_build
from stitchvm_reward.diffusion.generator import chosen_guidance
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import architecture_of, family_of
from stitchvm_reward.hub import is_hub_id, locate
from stitchvm_reward.rewards.clip import require_folder
from stitchvm_reward.rewards.custom import check_custom, find_function
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.runs.run_folder import check_run_folder
from stitchvm_reward.runs.tracking import check_trackers
from stitchvm_reward.stitching.check import check_stitch_recipe
from stitchvm_reward.stitching.value_model import read_config


def _check_model(model: str, parts: tuple[str, ...]) -> None:
    """Raise InputError for a local model folder that is missing or lacks a part; hub ids are checked on loading."""
    if is_hub_id(model):
        return
    folder = locate(model, parts)
    for part in parts:
        if not (folder / part).exists():
            raise InputError(f"{folder} lacks {part}; a model folder must have {', '.join(parts)}")


def check_value_model(reward: RewardRecipe, model: ModelRecipe) -> None:
    """Raise InputError for a value model that is made for another model, or that is missing and cannot be built."""
    stitch = to_build(reward)
    if stitch is None:
        config = read_config(Path(reward.value_model).expanduser())
        resolution, backbone = config["resolution"], config["backbone"]
        conditioning, length = backbone["conditioning"], backbone["text_length"]
    else:
        check_stitch_recipe(stitch)
        resolution, conditioning = stitch.model.resolution, stitch.backbone.conditioning
        length = stitch.model.text_length
    name = reward.stitch if stitch else reward.value_model
    if resolution != model.resolution:
        raise InputError(
            f"{name} is for {resolution} px, model.resolution is {model.resolution}: stitch a value model for this size"
        )
    if conditioning == "prompt" and length != model.text_length:
        raise InputError(
            f"{name} reads prompts of {length} tokens, model.text_length is {model.text_length}: set the one to the "
            "other"
        )


def builder_of(folder: Path) -> Path | None:
    """Return the recipe of recipes/stitch that writes this value model, or None."""
    for recipe in sorted(Path("recipes/stitch").glob("*.yaml")):
        if f"out: {folder.parent}" in recipe.read_text().splitlines():
            return recipe
    return None


def _check_deterministic(recipe: Recipe) -> None:
    """Raise InputError where a GPU has no deterministic kernel for what the recipe back-propagates."""
    gradient = objective_class(recipe.train.objective).cost(recipe.train).reward_gradient
    pixel = [reward.name for reward in recipe.rewards if not reward.custom and reward.kind != "value"]
    if recipe.model.deterministic and gradient and pixel and torch.cuda.is_available():
        raise InputError(
            f"model.deterministic is on, and reward {pixel[0]} resizes images by antialiased bicubic interpolation, "
            "whose backward pass (upsample_bicubic2d_aa_backward_out_cuda) has no deterministic kernel: set "
            "model.deterministic=false, or train on a value model"
        )


def check_recipe(recipe: Recipe) -> None:
    """Check everything of a run that does not need its weights. Raises InputError."""
    check_run_folder(recipe)
    check_inputs(recipe)
    check_prompts(recipe)


def check_inputs(recipe: Recipe) -> None:
    """Check the model, the rewards and the measures that a recipe names, without their weights. Raises InputError."""
    _check_model(recipe.model.path, ("model_index.json",))
    family = family_of(recipe.model.path)
    _check_model(recipe.model.path, ("model_index.json", "transformer", "vae", "scheduler", *family.text_parts))
    if not is_hub_id(recipe.model.path) or recipe.model.path in family.published:
        config = architecture_of(recipe.model.path).transformer
        chosen_guidance(family, config, recipe.model.guidance, recipe.model.path)
    check_trackers(recipe.tracking)
    _check_deterministic(recipe)
    for reward in recipe.rewards:
        if reward.custom:
            check_custom(reward)
            continue
        if reward.kind == "value":
            check_value_model(reward, recipe.model)
            continue
        require_folder(reward.model)
        _check_model(reward.model, ("config.json",))
        if reward.head and not Path(reward.head).expanduser().exists() and reward.head.count("/") != 1:
            raise InputError(f"aesthetic head not found: {reward.head}; give a file, a folder or a hub id")
    if recipe.train.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise InputError("train.optimizer adamw_8bit needs bitsandbytes: pip install 'stitch-nft[8bit]', or take adamw")
    if recipe.lora.start:
        read_lora(Path(recipe.lora.start).expanduser())
    for name in recipe.evaluation.metrics:
        find_function(name)
