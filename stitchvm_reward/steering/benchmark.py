"""The cost of a steered step at real shapes with random weights: by Tweedie's value and by a stitched value."""

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel

from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.families import architecture_of
from stitchvm_reward.measure import flops, fused_attention, peak_mib, timed
from stitchvm_reward.random_models import pixel_embedding, random_clip, random_conditions, random_generator
from stitchvm_reward.rewards.aesthetic import AestheticHead
from stitchvm_reward.rewards.tail import RewardTail
from stitchvm_reward.steering.denoiser import Denoiser, Known
from stitchvm_reward.steering.sampling import make_denoiser
from stitchvm_reward.steering.settings import Settings
from stitchvm_reward.steering.values import StitchedValue, TweedieValue, Value
from stitchvm_reward.stitching.benchmark import BLOCK, REWARD_BLOCK
from stitchvm_reward.stitching.config import StitchRecipe
from stitchvm_reward.stitching.value_model import StitchedValueModel, ValueNetwork, check_block

STEPS, STEP = 40, 20  # a step in the middle of a schedule


class _Judge:
    """A reward of images: a CLIP image tower and an aesthetic head, whatever kind of reward the recipe names."""

    def __init__(self, clip: CLIPModel, kind: str, device: torch.device):
        self.clip, self.kind = clip, kind
        self.head = AestheticHead(clip.config.projection_dim).to(device).eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(pixel_embedding(self.clip, self.kind, images))


def _subjects(recipe: StitchRecipe, guidance: float, device: torch.device) -> tuple[Denoiser, Value, Value]:
    """Return a denoiser of one prompt, and Tweedie's and the stitched value of one reward."""
    block, cut = recipe.backbone.block or BLOCK, recipe.reward.block or REWARD_BLOCK
    check_block(architecture_of(recipe.model.path), block)
    clip = random_clip(recipe.reward.model, device)
    generator = random_generator(recipe.model, device)
    head, judge = BackboneHead.of(generator), _Judge(clip, recipe.reward.kind, device)
    width = head.width(block, generator.latent_shape[0])
    network = ValueNetwork(width, RewardTail(clip, cut)).to(device).eval().requires_grad_(False)
    text = random_conditions(recipe.model, 1, device)
    config = {"backbone": {"block": block, "conditioning": "null"}, "latent_shape": generator.latent_shape}
    model = StitchedValueModel(head, network, judge.head, text, config)
    stitched = StitchedValue({"value": model}, {"value": 1.0})
    settings = Settings(steps=STEPS, guidance=guidance)
    denoiser = make_denoiser(generator, [""], text, text, value=stitched, settings=settings)
    return denoiser, TweedieValue({"value": judge}, {"value": 1.0}), stitched


def guided_step_costs(
    recipe: StitchRecipe, guidance: float, repeats: int, device: torch.device, shapes_only: bool = False
) -> list[dict[str, Any]]:
    """Return one row per method for a step of one latent.

    The methods are a plain step, a step guided by the gradient of Tweedie's value and of a stitched value (DPS), and a
    step together with one value of either kind, as Feynman-Kac steering needs it.

    A row holds the median milliseconds, the GFLOP, and the peak MiB in addition to the weights. With `shapes_only`,
    nothing is computed and there are no milliseconds. `recipe` names shapes and blocks; only configurations are read.
    Raises InputError for a model whose shapes are not known.
    """
    if shapes_only:
        with fused_attention():
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
        """Compute a value, and the step from what is then known."""
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
        cost = timed(call, 1, device, repeats) if repeats else {"milliseconds": None, "gigaflop": flops(call) / 1e9}
        rows.append({"method": name} | cost | {"peak_mib": peak_mib(call, device), "weights_mib": weights})
    return rows
