"""Parameters and FLOPs of a recipe's models on the meta device: no weights are loaded and no hub is asked."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from nft.config import Recipe
from nft.objectives import objective_class
from nft.policy import Policy
from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.generator import chosen_guidance
from stitchvm_reward.families import architecture_of
from stitchvm_reward.families.family import Architecture, Conditions
from stitchvm_reward.hub import is_hub_id
from stitchvm_reward.measure import flops
from stitchvm_reward.rewards.architectures import CLIPS, clip_configuration
from stitchvm_reward.stitching.value_model import empty_network, read_config


@dataclass(frozen=True)
class Costs:
    """Shapes and costs of a recipe's models; FLOPs are multiply-adds times two, of one sample.

    `training_flops` are a forward and a backward pass. Where the reward is back-propagated, `decode_training_flops` and
    `score_training_flops` are such passes too.
    """

    base_parameters: int
    adapted_layers: int
    adapter_parameters: int
    forward_flops: float
    training_flops: float
    decode_flops: float
    score_flops: float
    pixel_score_flops: float
    score_unknown: list[str]
    decode_training_flops: float = 0.0
    score_training_flops: float = 0.0


def _both_ways(call: Callable[[], Tensor]) -> float:
    """Return the FLOPs of a call and of its sum's backward pass."""
    return flops(lambda: call().sum().backward())


def _clip_call(model: str) -> tuple[CLIPModel, Callable[[], Tensor]]:
    """Return a CLIP model without weights, and a call that embeds one image, differentiable in it."""
    clip = CLIPModel(CLIPConfig(**clip_configuration(model))).requires_grad_(False)
    side = clip.config.vision_config.image_size
    pixels = torch.zeros(1, 3, side, side, requires_grad=True)
    return clip, lambda: clip.get_image_features(pixel_values=pixels).pooler_output


def _clip_flops(model: str) -> float | None:
    """Return the FLOPs of one image through a CLIP model's vision tower.

    None for a hub id whose shapes are not known here.
    """
    if is_hub_id(model) and model not in CLIPS:
        return None
    return flops(_clip_call(model)[1])


def _value_call(folder: str, architecture: Architecture, transformer: Any, null: Conditions) -> Callable | None:
    """Return a call that makes one score of a value model, differentiable in the latents.

    It includes the backbone's blocks. Returns None where the folder does not exist yet.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        return None
    config = read_config(path)
    guidance = config["backbone"].get("guidance")
    head = BackboneHead(architecture.family, transformer, guidance=guidance)
    network, block = empty_network(config, head).requires_grad_(False), config["backbone"]["block"]
    latents = torch.zeros(1, *config["latent_shape"], requires_grad=True)
    return lambda: network(head.features(latents, torch.zeros(1), null, [block])[block])[1]


def _scoring_flops(
    recipe: Recipe, vae: Any, latents: Tensor, scores: list[Callable[[], Tensor]]
) -> tuple[float, float]:
    """Return the FLOPs of decoding and of scoring one sample, each with its backward pass."""
    score = sum(_both_ways(call) for call in scores)
    if recipe.rollout.stop_window:
        return 0.0, score
    return _both_ways(lambda: vae.decode(latents.float().requires_grad_()).sample), score


def _clip_folders(recipe: Recipe) -> list[str]:
    """Return the CLIP models that score images, including those behind value models whose folders exist."""
    values = [Path(reward.value_model).expanduser() for reward in recipe.rewards if reward.kind == "value"]
    stitched = [read_config(folder)["reward"]["path"] for folder in values if folder.is_dir()]
    return [*stitched, *(reward.model for reward in recipe.rewards if reward.model)]


def costs(recipe: Recipe) -> Costs:
    """Return parameters and FLOPs of a recipe's models, counted once per process.

    Raises InputError for a model whose shapes are not known here.
    """
    values = [Path(reward.value_model).expanduser() / "config.json" for reward in recipe.rewards if reward.value_model]
    built = [path.read_text() if path.is_file() else "" for path in values]
    other = recipe.train.objective, recipe.rollout.stop_window
    key = repr((recipe.model, recipe.lora, recipe.rewards, built, other))
    if key not in _known:
        _known[key] = _count(recipe)
    return _known[key]


_known: dict[str, Costs] = {}


def _count(recipe: Recipe) -> Costs:
    architecture, dtype = architecture_of(recipe.model.path), recipe.model.torch_dtype
    family, resolution, length = architecture.family, recipe.model.resolution, recipe.model.text_length
    guidance = chosen_guidance(family, architecture.transformer, recipe.model.guidance, recipe.model.path)
    with torch.device("meta"):
        transformer = family.transformer.from_config(architecture.transformer).to(dtype).requires_grad_(False)
        vae = family.autoencoder.from_config(architecture.vae).requires_grad_(False)
        base = sum(p.numel() for p in transformer.parameters())
        null = family.stand_in(architecture, 1, length)
        values = {
            reward.name: _value_call(reward.value_model, architecture, transformer, null)
            for reward in recipe.rewards
            if reward.kind == "value"
        }
        with torch.no_grad():
            towers = _clip_folders(recipe)
            clips = {model: _clip_flops(model) for model in dict.fromkeys(towers)}
            scores = {name: None if call is None else flops(call) for name, call in values.items()}
            scores |= {reward.name: clips[reward.model] for reward in recipe.rewards if reward.model}
        targets = recipe.lora.targets or list(family.lora_targets)
        policy = Policy(transformer, recipe.lora.rank, recipe.lora.alpha, targets, recipe.seed)
        policy.network.to("meta")
        latents = torch.zeros(1, *architecture.latent_shape(resolution), dtype=dtype)
        inputs = family.inputs(latents, torch.zeros(1), null.to(latents.device, dtype), guidance)
        with torch.no_grad(), policy.using(None):
            forward = flops(lambda: transformer(**inputs))
        with torch.no_grad():
            decode = flops(lambda: vae.decode(latents.float()))
        training = _both_ways(lambda: transformer(**inputs)[0])
        scoring = 0.0, 0.0
        if objective_class(recipe.train.objective).cost(recipe.train).reward_gradient:
            calls = [call for call in values.values() if call is not None]
            calls += [_clip_call(reward.model)[1] for reward in recipe.rewards if clips.get(reward.model)]
            with policy.using(None):
                scoring = _scoring_flops(recipe, vae, latents, calls)
    return Costs(
        base_parameters=base,
        adapted_layers=len(policy.layers),
        adapter_parameters=sum(p.numel() for p in policy.tensors("current").values()),
        forward_flops=forward,
        training_flops=training,
        decode_flops=decode,
        score_flops=sum(cost or 0.0 for cost in scores.values()),
        pixel_score_flops=sum(clips[model] or 0.0 for model in towers),
        score_unknown=[reward.name for reward in recipe.rewards if scores.get(reward.name) is None],
        decode_training_flops=scoring[0],
        score_training_flops=scoring[1],
    )
