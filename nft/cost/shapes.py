"""Parameters, FLOPs and memory of a recipe's models on the meta device: no weights are loaded and no hub is asked."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    `score_training_flops` are such passes too, and `scoring_bytes` is what decoder and rewards keep between the two.
    """

    base_parameters: int
    adapted_layers: int
    adapter_parameters: int
    vae_parameters: int
    forward_flops: float
    training_flops: float
    decode_flops: float
    score_flops: float
    pixel_score_flops: float
    reward_bytes: int
    score_unknown: list[str]
    saved_bytes: int
    block_input_bytes: int
    blocks: int
    decode_training_flops: float = 0.0
    score_training_flops: float = 0.0
    scoring_bytes: int = 0


def _training_costs(call: Callable[[], Tensor], parameters: bool = True) -> tuple[float, int]:
    """Return the FLOPs of a call with its sum's backward pass, and the bytes that autograd keeps between the two.

    Each storage counts once. Frozen weights are kept by reference: they count too unless `parameters` is False.
    """
    sizes: dict[int, int] = {}
    alive: list = []

    def keep(tensor):
        if not parameters and isinstance(tensor._base if tensor._is_view() else tensor, torch.nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        sizes[id(storage)] = storage.nbytes()
        alive.append(storage)
        return tensor

    def both():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            end = call().sum()
        end.backward()

    return flops(both), sum(sizes.values())


def _clip_call(model: str) -> tuple[CLIPModel, Callable[[], Tensor]]:
    """Return a CLIP model without weights, and a call that embeds one image, differentiable in it."""
    clip = CLIPModel(CLIPConfig(**clip_configuration(model))).requires_grad_(False)
    side = clip.config.vision_config.image_size
    pixels = torch.zeros(1, 3, side, side, requires_grad=True)
    return clip, lambda: clip.get_image_features(pixel_values=pixels).pooler_output


def _clip_costs(model: str) -> tuple[float | None, int]:
    """Return the FLOPs of one image through a CLIP model's vision tower, and the bytes of all its weights in float32.

    They are None and 0 for a hub id whose shapes are not known here.
    """
    if is_hub_id(model) and model not in CLIPS:
        return None, 0
    clip, embed = _clip_call(model)
    return flops(embed), 4 * sum(p.numel() for p in clip.parameters())


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


def _scoring_costs(
    recipe: Recipe, vae: Any, latents: Tensor, scores: list[Callable[[], Tensor]]
) -> tuple[float, float, int]:
    """Return the FLOPs of decoding and of scoring one sample, each with its backward pass, and the bytes they keep.

    A decoder that is checkpointed keeps the inputs of its blocks and, one at a time, what is inside a block.
    """
    scored = [_training_costs(call, False) for call in scores]
    cost, kept = sum(one for one, _ in scored), sum(size for _, size in scored)
    if recipe.rollout.stop_window:
        return 0.0, cost, kept
    inputs: list[tuple[torch.nn.Module, torch.Size]] = []
    blocks = [vae.decoder.mid_block, *vae.decoder.up_blocks]
    hooks = [
        block.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0].shape))) for block in blocks
    ]
    decode, saved = _training_costs(lambda: vae.decode(latents.float().requires_grad_()).sample, False)
    for hook in hooks:
        hook.remove()
    if recipe.train.gradient_checkpointing:
        inside = [
            _training_costs(partial(block, torch.zeros(shape, requires_grad=True)), False)[1] for block, shape in inputs
        ]
        saved = sum(4 * shape.numel() for _, shape in inputs) + max(inside)
    return decode, cost, kept + saved * getattr(torch, recipe.model.vae_dtype).itemsize // 4


def _clip_folders(recipe: Recipe) -> list[str]:
    """Return the CLIP models that score images, including those behind value models whose folders exist."""
    values = [Path(reward.value_model).expanduser() for reward in recipe.rewards if reward.kind == "value"]
    stitched = [read_config(folder)["reward"]["path"] for folder in values if folder.is_dir()]
    return [*stitched, *(reward.model for reward in recipe.rewards if reward.model)]


def costs(recipe: Recipe) -> Costs:
    """Return parameters, FLOPs and the memory of one sample's training pass, counted once per process.

    Raises InputError for a model whose shapes are not known here.
    """
    values = [Path(reward.value_model).expanduser() / "config.json" for reward in recipe.rewards if reward.value_model]
    built = [path.read_text() if path.is_file() else "" for path in values]
    other = recipe.train.objective, recipe.train.gradient_checkpointing, recipe.rollout.stop_window
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
            clips = {model: _clip_costs(model) for model in dict.fromkeys(towers)}
            scores = {name: None if call is None else flops(call) for name, call in values.items()}
            scores |= {reward.name: clips[reward.model][0] for reward in recipe.rewards if reward.model}
        targets = recipe.lora.targets or list(family.lora_targets)
        policy = Policy(transformer, recipe.lora.rank, recipe.lora.alpha, targets, recipe.seed)
        policy.network.to("meta")
        latents = torch.zeros(1, *architecture.latent_shape(resolution), dtype=dtype)
        inputs = family.inputs(latents, torch.zeros(1), null.to(latents.device, dtype), guidance)
        with torch.no_grad(), policy.using(None):
            forward = flops(lambda: transformer(**inputs))
        with torch.no_grad():
            decode = flops(lambda: vae.decode(latents.float()))
        training, saved = _training_costs(lambda: transformer(**inputs)[0])
        scoring = 0.0, 0.0, 0
        if objective_class(recipe.train.objective).cost(recipe.train).reward_gradient:
            calls = [call for call in values.values() if call is not None]
            calls += [_clip_call(reward.model)[1] for reward in recipe.rewards if clips.get(reward.model, (None, 0))[0]]
            with policy.using(None):
                scoring = _scoring_costs(recipe, vae, latents, calls)
        weights = sum(p.numel() * p.element_size() for p in transformer.parameters())
    tokens, width = family.sequence(architecture, resolution, length)
    return Costs(
        base_parameters=base,
        adapted_layers=len(policy.layers),
        adapter_parameters=sum(p.numel() for p in policy.tensors("current").values()),
        vae_parameters=sum(p.numel() for p in vae.parameters()),
        forward_flops=forward,
        training_flops=training,
        decode_flops=decode,
        score_flops=sum(cost or 0.0 for cost in scores.values()),
        pixel_score_flops=sum(clips[model][0] or 0.0 for model in towers),
        reward_bytes=sum(clips[model][1] for model in towers),
        score_unknown=[reward.name for reward in recipe.rewards if scores.get(reward.name) is None],
        # Frozen weights are saved by reference for the backward pass; they are counted with the weights.
        saved_bytes=max(0, saved - weights),
        block_input_bytes=tokens * width * dtype.itemsize,
        blocks=len(family.blocks(transformer)),
        decode_training_flops=scoring[0],
        score_training_flops=scoring[1],
        scoring_bytes=scoring[2],
    )
