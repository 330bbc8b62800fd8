"""What steering costs at a model's real shapes with random weights: by Tweedie's value and by a stitched one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import CLIPModel

from stitchvm_reward.diffusion.architectures import configurations
from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.generator import Conditions
from stitchvm_reward.rewards.aesthetic import AestheticHead
from stitchvm_reward.rewards.tail import RewardTail
from stitchvm_reward.steering.denoiser import Denoiser, Known
from stitchvm_reward.steering.sampling import make_denoiser
from stitchvm_reward.steering.settings import Settings
from stitchvm_reward.steering.values import StitchedValue, TweedieValue, Value
from stitchvm_reward.stitching.benchmark import (
    BLOCK,
    REWARD_BLOCK,
    flops,
    peak_mib,
    pixel_embedding,
    random_clip,
    random_generator,
    timed,
)
from stitchvm_reward.stitching.config import StitchRecipe
from stitchvm_reward.stitching.value_model import StitchedValueModel, ValueNetwork

STEPS, STEP = 40, 20  # a step in the middle of a schedule


class _FusedAttention(TorchFunctionMode):
    """On the meta device, the fused attention that devices run: left to itself it would hold every score of it."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is F.scaled_dot_product_attention:
            scale = (named or {}).get("scale")
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*arguments[:3], scale=scale)[0]
        return function(*arguments, **(named or {}))


class _Judge:
    """A reward of images: a CLIP model's tower and an aesthetic head, of any kind that a recipe names."""

    def __init__(self, clip: CLIPModel, kind: str, device: torch.device):
        self.clip, self.kind = clip, kind
        self.head = AestheticHead(clip.config.projection_dim).to(device).eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(pixel_embedding(self.clip, self.kind, images))


def _subjects(recipe: StitchRecipe, guidance: float, device: torch.device) -> tuple[Denoiser, Value, Value]:
    """A denoiser of one prompt, and Tweedie's and the stitched value of one reward on it."""
    block, cut, backbone = recipe.backbone.block or BLOCK, recipe.reward.block or REWARD_BLOCK, recipe.backbone
    clip, clip_tokens = random_clip(recipe.reward.model, device), configurations(backbone.path)[2]
    generator = random_generator(backbone.path, backbone.dtype, "float32", backbone.resolution, device)
    head, judge = BackboneHead(generator.transformer), _Judge(clip, recipe.reward.kind, device)
    network = ValueNetwork(head.width(block), RewardTail(clip, cut)).to(device).eval().requires_grad_(False)
    config, tokens = generator.transformer.config, clip_tokens + backbone.t5_length
    text = Conditions(
        torch.randn(1, tokens, config.joint_attention_dim).to(device, generator.dtype),
        torch.randn(1, config.pooled_projection_dim).to(device, generator.dtype),
    )
    about = {
        "backbone": {"block": block, "conditioning": "null"},
        "latent_shape": generator.latent_shape,
    }
    model = StitchedValueModel(head, network, judge.head, text, about)
    stitched = StitchedValue({"value": model}, {"value": 1.0})
    settings = Settings(steps=STEPS, guidance=guidance)
    denoiser = make_denoiser(generator, [""], text, text, stitched, settings)
    return denoiser, TweedieValue({"value": judge}, {"value": 1.0}), stitched


def guided_step_costs(
    recipe: StitchRecipe, guidance: float, repeats: int, device: torch.device, shapes_only: bool = False
) -> list[dict[str, Any]]:
    """One row a method for one latent: a plain step, a step guided by the gradient of Tweedie's value and of a stitched
    one (DPS), and what Feynman-Kac steering adds to a step for one value of either kind.

    Milliseconds (the median), GFLOP, and the peak MiB beside the weights; with `shapes_only` nothing is computed and
    there are no milliseconds. `recipe` names shapes and blocks; no weights are read. Raises InputError for a model
    whose shape is not known here.
    """
    if shapes_only:
        with _FusedAttention():
            return _costs(recipe, guidance, 0, torch.device("meta"))
    return _costs(recipe, guidance, repeats, device)


def _costs(recipe: StitchRecipe, guidance: float, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    denoiser, tweedie, stitched = _subjects(recipe, guidance, device)
    latents = torch.randn(1, *denoiser.generator.latent_shape).to(device)
    sigma = denoiser.sigmas[STEP]

    def plain() -> Tensor:
        return denoiser.velocity(latents, sigma, Known())

    def guided(value: Value) -> Tensor:
        _, slope, known = value.gradient(denoiser, latents, STEP)
        return denoiser.velocity(latents, sigma, known) - slope

    def valued(value: Value) -> Tensor:
        """A value and the step that goes on from what it makes known."""
        _, known = value.measure(denoiser, latents, STEP)
        return denoiser.velocity(latents, sigma, known)

    calls = {
        "step": plain,
        "DPS": lambda: guided(tweedie),
        "DPS + StitchVM": lambda: guided(stitched),
        "step with Tweedie's value": lambda: valued(tweedie),
        "step with a stitched value": lambda: valued(stitched),
    }
    weights = sum(p.numel() * p.element_size() for p in denoiser.generator.transformer.parameters()) / 2**20
    rows = []
    for name, call in calls.items():
        found = timed(call, 1, device, repeats) if repeats else {"milliseconds": None, "gigaflop": flops(call) / 1e9}
        rows.append({"method": name} | found | {"peak_mib": peak_mib(call, device), "weights_mib": weights})
    return rows
