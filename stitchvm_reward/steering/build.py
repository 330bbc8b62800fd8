"""Values as recipes describe them, and steering of a diffusers pipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import architecture_of, family_of_class
from stitchvm_reward.families.family import Architecture, Conditions, Family
from stitchvm_reward.rewards import Reward, check_custom, load_reward
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.steering.memory import encoders_away, free_memory
from stitchvm_reward.steering.sampling import (
    as_value,
    candidate_bytes,
    make_denoiser,
    progress_bar,
    require_memory,
    steer_prompts,
)
from stitchvm_reward.steering.settings import Settings, SteeringRecipe
from stitchvm_reward.steering.values import MonteCarloValue, StitchedValue, TweedieValue, Value
from stitchvm_reward.stitching.value_model import load_for, read_config

SAMPLE_SIZE = 128  # side of the latents that a transformer was trained on, where its configuration does not say


def check_rewards(recipe: SteeringRecipe) -> None:
    """Check value models, functions and classes without loading weights. Raises InputError."""
    for reward in recipe.rewards:
        if reward.kind == "value":
            read_config(Path(reward.value_model).expanduser())
        check_custom(reward)


def pixel_reward(reward: RewardRecipe, device: torch.device) -> Reward:
    """Load a reward of images; for a value model, the reward that it was stitched from. Raises InputError."""
    if reward.kind == "value":
        stitched = read_config(Path(reward.value_model).expanduser())["reward"]
        reward = RewardRecipe(kind=stitched["kind"], model=stitched["path"], head=stitched["head"])
    return load_reward(reward, device)


def load_value(recipe: SteeringRecipe, generator: Generator, shared: bool = True) -> Value:
    """Load the recipe's value for a generator.

    Value models that were stitched to the generator's own network run on its blocks if `shared`. Raises InputError if
    one is missing or does not fit the generator.
    """
    weights = {reward.name: reward.weight for reward in recipe.rewards}
    if recipe.rewards[0].kind == "value":
        folders = {reward.name: reward.value_model for reward in recipe.rewards}
        return StitchedValue(load_for(folders, generator, shared), weights)
    rewards = {reward.name: pixel_reward(reward, generator.device) for reward in recipe.rewards}
    if recipe.estimate == "monte_carlo":
        return MonteCarloValue(rewards, weights, recipe.rollouts)
    return TweedieValue(rewards, weights)


def check_memory_first(
    model: str, resolution: int | None, *, dtype: torch.dtype, device: torch.device, method: str, settings: Settings
) -> None:
    """Check that the particles fit into the device's memory, for a model that is not loaded yet.

    A model whose configurations are not available is not checked. Raises InputError.
    """
    try:
        architecture = architecture_of(model)
    except InputError:
        return
    side = resolution or architecture.transformer.get("sample_size", SAMPLE_SIZE) * architecture.latent_factor
    each = candidate_bytes(architecture, side, architecture.family.text_length, dtype)
    require_memory(method, settings, each, free_memory(device))


@dataclass(frozen=True)
class Pictures:
    """`images` (prompts, 3, height, width) float32 in [0, 1] on the CPU, one per prompt, and a `trace` per prompt.

    A trace holds values, effective sample sizes and ancestors by step, the final values and the chosen particle.
    """

    images: Tensor
    trace: list[dict[str, Any]]


def steer(
    pipeline: Any,
    prompts: list[str],
    method: str = "fk",
    value: Any = None,
    settings: Settings | None = None,
    *,
    negative_prompt: str = "",
    resolution: int | None = None,
    text_length: int | None = None,
) -> Pictures:
    """Sample one picture per prompt with a diffusers pipeline, steered toward high values.

    `method` is best_of_n, fk or dps. `value` is a StitchedValueModel, a dict of them, a reward of images with
    score(images, prompts), or a Value of steering.values. A picture depends on the seed and on the position of its
    prompt in the list, not on settings.micro_batch. The pipeline's networks are frozen and put into evaluation mode,
    and its text encoders leave the GPU meanwhile. Value models move to the pipeline's device. Attached adapters take
    part in sampling, but a value model must not run on blocks that they change.

    Raises InputError for a pipeline of an unknown family, and for settings, a value or a model that do not fit.
    """
    settings, chosen = settings or Settings(), as_value(value)
    settings.require_method(method)
    if not prompts:
        raise InputError("prompts must hold at least one prompt, got none")
    family = family_of_class(type(pipeline).__name__, "the pipeline")
    side = resolution or pipeline.default_sample_size * pipeline.vae_scale_factor
    generator = Generator.of_pipeline(pipeline, side, settings.guidance)
    if generator.guidance is not None and negative_prompt:
        raise InputError("a guidance-distilled model has no unguided branch: negative_prompt must be empty")
    if isinstance(chosen, StitchedValue):
        for model in chosen.models.values():
            model.require_fit(generator)
            model.to(generator.device)
            if model.backbone.network is generator.transformer and has_adapters(pipeline):
                raise InputError(
                    "the value model runs on the pipeline's own blocks, which have adapters now: load it with blocks "
                    "of its own (from_pretrained without backbone), or unload the adapters"
                )
    length = text_length or default_text_length(family, pipeline)
    each = candidate_bytes(live_architecture(family, pipeline), side, length, generator.dtype)
    require_memory(method, settings, each, free_memory(generator.device))
    conditions, negative = encode(pipeline, prompts, negative_prompt, length)
    with encoders_away(family, pipeline, generator.device):
        denoiser = make_denoiser(
            generator, prompts, conditions, negative, value=chosen, settings=settings, method=method, kept=each
        )
        with progress_bar(denoiser, method, settings) as bar:
            steered = steer_prompts(denoiser, method, chosen, settings, bar)
        with torch.no_grad():
            images = torch.cat([generator.decode(part.best).cpu() for part in steered])
    return Pictures(images, [trace for part in steered for trace in part.as_dicts()])


def has_adapters(pipeline: Any) -> bool:
    """Return whether adapters are attached to the pipeline's transformer."""
    return bool(getattr(pipeline.transformer, "peft_config", None))


def _tokenizers(family: Family, pipeline: Any) -> list[Any]:
    return [getattr(pipeline, part) for part in family.text_parts if part.startswith("tokenizer")]


def default_text_length(family: Family, pipeline: Any) -> int:
    """Return the number of text tokens that a loaded pipeline reads by default."""
    last = _tokenizers(family, pipeline)[-1]
    return family.text_length if last is None else min(family.text_length, last.model_max_length)


def live_architecture(family: Family, pipeline: Any) -> Architecture:
    """Return the configurations of a loaded pipeline."""
    tokenizer = next(tokenizer for tokenizer in _tokenizers(family, pipeline) if tokenizer is not None)
    configs = pipeline.transformer.config, pipeline.vae.config, pipeline.scheduler.config
    return Architecture(family, "the pipeline", *configs, text_encoders=(), clip_tokens=tokenizer.model_max_length)


@torch.no_grad()
def encode(
    pipeline: Any, prompts: list[str], negative_prompt: str, text_length: int, batch: int = 16
) -> tuple[Conditions, Conditions]:
    """Return the conditions of the prompts, one row each, and of the negative prompt, one row.

    Each distinct text is encoded once.
    """
    family = family_of_class(type(pipeline).__name__, "the pipeline")
    texts = list(dict.fromkeys([*prompts, negative_prompt]))
    parts = [
        family.encode(pipeline, texts[start : start + batch], text_length) for start in range(0, len(texts), batch)
    ]
    table = Conditions({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    rows = torch.tensor([texts.index(prompt) for prompt in prompts], device=table.device)
    return table.select(rows), table.select(torch.tensor([texts.index(negative_prompt)], device=table.device))
