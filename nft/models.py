"""What a recipe says of the generator and of the optimizer, made."""

from pathlib import Path

import torch
from torch import nn

from nft.config import Recipe, TrainRecipe
from nft.lora import read_lora
from nft.policy import Policy
from stitchvm_reward.diffusion.generator import Generator


def load_generator(recipe: Recipe, device: torch.device) -> Generator:
    """The recipe's generator, with what the recipe says of its memory."""
    model = recipe.model
    formats = getattr(torch, model.dtype), getattr(torch, model.vae_dtype)
    generator = Generator.load(model.path, formats[0], device, model.resolution, formats[1])
    spare_memory(generator, recipe)
    return generator


def spare_memory(generator: Generator, recipe: Recipe) -> None:
    """Slice decoding and checkpoint blocks where the recipe says so; the decoder's only draft runs with gradient."""
    if recipe.model.vae_slicing:
        generator.vae.enable_slicing()
    if recipe.train.gradient_checkpointing:
        generator.transformer.enable_gradient_checkpointing()
        generator.vae.enable_gradient_checkpointing()


def make_policy(recipe: Recipe, generator: Generator) -> Policy:
    """The recipe's adapters on the generator's transformer, at their beginning or at that of `lora.start`."""
    lora = recipe.lora
    policy = Policy(generator.transformer, lora.rank, lora.alpha, lora.targets, recipe.seed, lora.init)
    if lora.start:
        policy.start_from(read_lora(Path(lora.start).expanduser()))
    return policy


def make_optimizer(train: TrainRecipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW on float32 adapters, its moments in 32 or in 8 bits."""
    rate, decay = train.learning_rate, train.weight_decay
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=True)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=rate, weight_decay=decay)
