"""What a recipe says of the generator and of the optimizer, made."""

import torch
from torch import nn

from nft.config import Recipe, TrainRecipe
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.errors import InputError


def load_generator(recipe: Recipe, device: torch.device) -> Generator:
    """The recipe's generator, with what the recipe says of its memory."""
    model = recipe.model
    formats = getattr(torch, model.dtype), getattr(torch, model.vae_dtype)
    generator = Generator.load(model.path, formats[0], device, model.resolution, formats[1])
    if model.vae_slicing:
        generator.vae.enable_slicing()
    if recipe.train.gradient_checkpointing:
        generator.transformer.enable_gradient_checkpointing()
    return generator


def make_optimizer(train: TrainRecipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW on float32 adapters, its moments in 32 or in 8 bits. Raises InputError where bitsandbytes is missing."""
    options = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError(
            "train.optimizer adamw_8bit needs bitsandbytes: pip install 'stitch-nft[8bit]', or take adamw"
        ) from None
    return AdamW8bit(parameters, **options)
