"""Models with the shapes of real ones and random weights: nothing is downloaded but configurations."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from stitchvm_reward.diffusion.generator import Generator, chosen_guidance
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.families import architecture_of
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.rewards.architectures import clip_configuration
from stitchvm_reward.rewards.clip import FITS
from stitchvm_reward.rewards.preprocess import normalise


def randomised(network: nn.Module, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a network of the meta device on a real device, with random weights.

    Weights are random because a GPU multiplies zeros faster than other numbers.
    """
    network = network.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            tensor.normal_(0, 0.02)
        elif tensor.ndim:  # positions
            tensor.copy_(torch.arange(tensor.numel(), device=device).view_as(tensor))
    return network


def random_generator(model: ModelRecipe, device: torch.device, vae_dtype: torch.dtype = torch.float32) -> Generator:
    """Return a generator with random weights and the shapes of a model folder or a published hub id.

    Raises InputError for a model whose configurations are not available.
    """
    architecture = architecture_of(model.path)
    family = architecture.family
    with torch.device("meta"):
        transformer = family.transformer.from_config(dict(architecture.transformer))
        vae = family.autoencoder.from_config(dict(architecture.vae))
    return Generator(
        family,
        randomised(transformer, model.torch_dtype, device),
        randomised(vae, vae_dtype, device),
        scheduler=architecture.scheduler,
        resolution=model.resolution,
        guidance=chosen_guidance(family, architecture.transformer, model.guidance, model.path),
    )


def random_conditions(model: ModelRecipe, count: int, device: torch.device) -> Conditions:
    """Return random conditions of `count` prompts, in the model's number format. Raises InputError."""
    architecture = architecture_of(model.path)
    zeros = architecture.family.stand_in(architecture, count, model.text_length)
    tensors = {
        name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in zeros.tensors.items()
    }
    return Conditions(tensors).to(device, model.torch_dtype)


def random_clip(model: str, device: torch.device) -> CLIPModel:
    """Return a float32 CLIP model with random weights and the shapes of a folder or a known hub id.

    Raises InputError for a model whose shapes are not known.
    """
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**clip_configuration(model)))
    return randomised(clip, torch.float32, device)


def pixel_embedding(clip: CLIPModel, kind: str, images: Tensor) -> Tensor:
    """Return the embeddings that a reward of this kind computes of images (batch, 3, h, w) in [0, 1]."""
    pixels = normalise(FITS[kind](images, clip.config.vision_config.image_size))
    return clip.get_image_features(pixel_values=pixels).pooler_output
