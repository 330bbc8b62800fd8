"""What building a value model costs, from shapes: no weights are loaded."""

from functools import partial
from pathlib import Path
from statistics import mean

import torch
from transformers import CLIPConfig, CLIPModel

from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import architecture_of
from stitchvm_reward.measure import flops
from stitchvm_reward.rewards.architectures import clip_configuration
from stitchvm_reward.rewards.tail import RewardTail
from stitchvm_reward.stitching.benchmark import BLOCK, REWARD_BLOCK
from stitchvm_reward.stitching.config import StitchRecipe
from stitchvm_reward.stitching.generate import guidance_of
from stitchvm_reward.stitching.images import find_images
from stitchvm_reward.stitching.value_model import ValueNetwork

PEAK, REACHED = 989e12, 0.45  # FLOP/s of an H100 in bf16, and the share of it that is assumed to be reached


def image_count(recipe: StitchRecipe) -> int | None:
    """Return the number of images, None for a data set on the hub of which all are used."""
    data = recipe.data
    if data.generate.images:
        return data.generate.images
    if Path(data.images).expanduser().is_dir():
        return len(find_images(data.images, "", "", "", data.limit))
    return data.limit or None


def work(recipe: StitchRecipe, count: int) -> dict[str, float]:
    """Return the TFLOP of a build with `count` images over all processes, by phase; a multiply-add counts as two.

    Blocks that the search has yet to choose are taken to be the fourth and the first. Raises InputError for models
    whose shapes are not known here.
    """
    architecture, data, tune = architecture_of(recipe.model.path), recipe.data, recipe.finetune
    family, shape = architecture.family, architecture.latent_shape(recipe.model.resolution)
    block = BLOCK if recipe.backbone.block is None else recipe.backbone.block
    scales, distilled = guidance_of(recipe)
    with torch.device("meta"), torch.no_grad():
        clip = CLIPModel(CLIPConfig(**clip_configuration(recipe.reward.model)))
        vae = family.autoencoder.from_config(architecture.vae)
        embedded = scales[0] if distilled else None
        head = BackboneHead(family, family.transformer.from_config(architecture.transformer), guidance=embedded)
        network = ValueNetwork(head.width(block, shape[0]), RewardTail(clip, recipe.reward.block or REWARD_BLOCK))
        null, latents = family.stand_in(architecture, 1, recipe.model.text_length), torch.zeros(1, *shape)
        inputs = family.inputs(latents, torch.zeros(1), null, embedded)
        image = torch.zeros(1, 3, *[recipe.model.resolution] * 2)
        pixels = torch.zeros(1, 3, *[clip.config.vision_config.image_size] * 2)
        forward = flops(lambda: head.network(**inputs))
        features = head.features(latents, torch.zeros(1), null, [block])[block]
        backbone = flops(lambda: head.features(latents, torch.zeros(1), null, [block]))
        tail = flops(lambda: network(features))
        tower = flops(lambda: clip.get_image_features(pixel_values=pixels))
        coder = flops((lambda: vae.decode(latents)) if data.generate.images else (lambda: vae.encode(image)))
        texts = family.text_modules(architecture, recipe.model.text_length) if data.generate.images else []
        text = sum(flops(partial(module, torch.ones(1, length, dtype=torch.long))) for module, length in texts)
    passes = data.generate.steps * mean(1 if distilled or scale == 1 else 2 for scale in scales)
    measured = (1 + tune.epochs // recipe.evaluation.every) * len(recipe.evaluation.sigmas) * data.held_out
    phases = {
        "draw images": count * (passes * forward + text) if data.generate.images else 0.0,
        "latents and targets": count * (coder + tower),
        "search": (recipe.search.probe + recipe.search.held_out) * (forward + tower),
        # A backward pass costs two forward passes.
        "finetune": tune.epochs * (count - data.held_out) * (backbone + 3 * tail) + measured * (backbone + tail),
    }
    return {phase: size / 1e12 for phase, size in phases.items() if size}


def plan_lines(recipe: StitchRecipe) -> list[str]:
    """Return what a build does and what it costs, as far as that can be known before anything is loaded."""
    generate, count = recipe.data.generate, image_count(recipe)
    images = f"{'all' if count is None else f'{count:,}'} images of {recipe.data.images}"
    if generate.images:
        scales, distilled = guidance_of(recipe)
        kind = "embedded guidance" if distilled else "guidance"
        shown = " and ".join(f"{scale:g}" for scale in scales)
        images = f"{count:,} images drawn of {generate.prompts}, {generate.steps} steps, {kind} {shown}"
    lines = [f"             {images}, {recipe.finetune.epochs} epochs"]
    if count is None:
        return [*lines, "             its cost is not known before the data set is loaded"]
    try:
        phases = work(recipe, count)
    except InputError as error:
        return [*lines, f"             its cost is not known: {error}"]
    whole = sum(phases.values())
    hours = whole * 1e12 / (PEAK * REACHED) / 3600
    return [
        *lines,
        f"             {', '.join(f'{phase} {tflop:,.3g}' for phase, tflop in phases.items())} TFLOP: about "
        f"{hours:.2g} GPU-hours, if an H100 reaches {REACHED:.0%} of its bf16 peak",
    ]
