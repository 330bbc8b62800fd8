"""The cost of one score at real shapes with random weights: a stitched value against Tweedie's estimate."""

from typing import Any

import torch
from torch import Tensor

from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.path import denoised
from stitchvm_reward.families import architecture_of
from stitchvm_reward.measure import timed
from stitchvm_reward.random_models import pixel_embedding, random_clip, random_conditions, random_generator
from stitchvm_reward.rewards.tail import RewardTail
from stitchvm_reward.stitching.config import StitchRecipe
from stitchvm_reward.stitching.value_model import ValueNetwork, check_block

SIGMA = 0.5
# The cut for a recipe that leaves it to the search: what the search finds for a model of 24 blocks.
BLOCK, REWARD_BLOCK = 4, 1


def score_costs(recipe: StitchRecipe, batch: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Return one row for a stitched value and one for Tweedie's estimate, each of `batch` latents at once.

    `recipe` names the shapes and the blocks. Only configurations are read. Raises InputError for a model whose shapes
    are not known, and for a block that does not exist.
    """
    block, reward_block = recipe.backbone.block or BLOCK, recipe.reward.block or REWARD_BLOCK
    check_block(architecture_of(recipe.model.path), block)
    clip = random_clip(recipe.reward.model, device)
    generator = random_generator(recipe.model, device)
    head = BackboneHead.of(generator)
    width = head.width(block, generator.latent_shape[0])
    network = ValueNetwork(width, RewardTail(clip, reward_block)).to(device).eval()
    conditions = random_conditions(recipe.model, batch, device)
    latents = torch.randn(batch, *generator.latent_shape, device=device)
    sigma = torch.full((batch,), SIGMA, device=device)

    def stitched() -> Tensor:
        return network(head.features(latents, sigma, conditions, [block])[block])[1]

    def tweedie() -> Tensor:
        velocity = generator.velocity(latents, sigma, conditions).float()
        images = generator.decode(denoised(latents, velocity, sigma[:, None, None, None]))
        return pixel_embedding(clip, recipe.reward.kind, images)

    with torch.no_grad():
        return [
            {"method": name} | timed(call, batch, device, repeats)
            for name, call in (("stitched", stitched), ("tweedie", tweedie))
        ]
