"""CLIP vision towers cut at a block: the states of the first part, and the last part as a trainable network."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from stitchvm_reward.errors import InputError


def _positions(vision) -> Tensor:
    return vision.embeddings.position_embedding.weight


def vision_states(clip: CLIPModel, pixels: Tensor, last: int) -> list[Tensor]:
    """Return the inputs of the vision tower's blocks 1 to `last`, and the output of block `last`, for its `pixels`.

    Item 0 is the patch embedding alone, (batch, patches, width), which a cut at block 1 is stitched to. Item k > 0 is
    the state after block k, (batch, 1 + patches, width).
    """
    vision = clip.vision_model
    patches = vision.embeddings.patch_embedding(pixels.to(clip.dtype)).flatten(2).transpose(1, 2)
    states, collected = with_class(patches, vision.embeddings.class_embedding, _positions(vision)), [patches]
    states = vision.pre_layrnorm(states)
    for layer in vision.encoder.layers[:last]:
        states = layer(states, None)
        collected.append(states)
    return collected


def with_class(patches: Tensor, class_embedding: Tensor, positions: Tensor) -> Tensor:
    """Prepend the class token to (batch, patches, width) and add the position embeddings."""
    first = class_embedding.to(patches).expand(len(patches), 1, -1)
    return torch.cat([first, patches], dim=1) + positions.to(patches)


class RewardTail(nn.Module):
    """A trainable copy of a CLIP vision tower from block j on, with its last norm and projection.

    For j = 1, the class token, position embeddings and first norm are the tower's. For j > 1, these lie before the
    cut, and the class token's mean state and the mean offset at each position, measured on a probe set, replace them.
    """

    def __init__(self, clip: CLIPModel, first: int):
        super().__init__()
        vision, depth = clip.vision_model, clip.config.vision_config.num_hidden_layers
        if not 1 <= first <= depth:
            raise InputError(f"the reward model has {depth} blocks and can be cut at 1 to {depth}, got {first}")
        self.first = first
        self.side = vision.embeddings.image_size // vision.embeddings.patch_size
        self.width: int = clip.config.vision_config.hidden_size
        self.class_embedding = nn.Parameter(vision.embeddings.class_embedding.detach().clone())
        self.positions = nn.Parameter(_positions(vision).detach().clone())
        self.norm = copy.deepcopy(vision.pre_layrnorm) if first == 1 else nn.Identity()
        self.layers = copy.deepcopy(vision.encoder.layers[first - 1 :])
        self.post_norm = copy.deepcopy(vision.post_layernorm)
        self.projection = copy.deepcopy(clip.visual_projection)

    @torch.no_grad()
    def set_start(self, class_state: Tensor, offsets: Tensor) -> None:
        """For j > 1, set the class token's mean state (width,) and each position's mean offset (patches, width)."""
        self.class_embedding.copy_(class_state)
        self.positions.copy_(torch.cat([torch.zeros_like(offsets[:1]), offsets]))

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last states (batch, 1 + patches, width) and normalised embeddings (batch, projection), float32.

        `patches` (batch, width, side, side) lie on the tower's patch grid.
        """
        patches = patches.flatten(2).transpose(1, 2).to(self.positions.dtype)
        states = self.norm(with_class(patches, self.class_embedding, self.positions))
        for layer in self.layers:
            states = layer(states, None)
        return states.float(), self.embed(states)

    def embed(self, states: Tensor) -> Tensor:
        """Return the normalised embeddings of last states."""
        return F.normalize(self.projection(self.post_norm(states[:, 0])).float(), dim=-1)
