"""The generator and the policy that a recipe describes."""

from pathlib import Path
from typing import Any

import torch

from nft.config import Recipe
from nft.export.lora import read_lora
from nft.policy import Policy
from stitchvm_reward.diffusion.generator import Generator


def load_generator(recipe: Recipe, device: torch.device, transformer: Any = None) -> Generator:
    """Load the recipe's generator, set up as the recipe says. Raises InputError.

    `transformer` is its transformer where it has been loaded already, as `load_sharded` does.
    """
    generator = Generator.load(recipe.model, device, getattr(torch, recipe.model.vae_dtype), transformer)
    configure(generator, recipe)
    return generator


def configure(generator: Generator, recipe: Recipe) -> None:
    """Slice decoding and checkpoint blocks where the recipe says so; only draft runs the decoder with gradient.

    A bfloat16 autoencoder's weights get the layout in which tensor cores convolve.
    """
    if recipe.model.vae_dtype == "bfloat16":
        generator.vae.to(memory_format=torch.channels_last)
    if recipe.model.vae_slicing:
        generator.vae.enable_slicing()
    if recipe.train.gradient_checkpointing:
        generator.transformer.enable_gradient_checkpointing()
        generator.vae.enable_gradient_checkpointing()


def make_policy(recipe: Recipe, generator: Generator) -> Policy:
    """Add the recipe's adapters to the generator's transformer, initialised anew or from `lora.start`."""
    lora = recipe.lora
    targets = lora.targets or list(generator.family.lora_targets)
    policy = Policy(generator.transformer, lora.rank, lora.alpha, targets, recipe.seed, init=lora.init)
    if lora.start:
        policy.start_from(read_lora(Path(lora.start).expanduser()))
    return policy
