"""Values as a recipe names them, and steering of a diffusers pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from stitchvm_reward.diffusion.architectures import configurations
from stitchvm_reward.diffusion.generator import Conditions, Generator
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards import Reward, find_function, load_reward
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.steering.sampling import (
    T5_LENGTH,
    as_value,
    free_memory,
    make_denoiser,
    progress_bar,
    require_memory,
    steer_prompts,
)
from stitchvm_reward.steering.settings import Settings, SteeringRecipe
from stitchvm_reward.steering.values import MonteCarloValue, StitchedValue, TweedieValue, Value
from stitchvm_reward.stitching.value_model import load_for, read_config


def check_rewards(recipe: SteeringRecipe) -> None:
    """Raise InputError for a value model or a function that is not there, before anything is loaded."""
    for reward in recipe.rewards:
        if reward.kind == "value":
            read_config(Path(reward.value_model).expanduser())
        elif reward.kind == "function":
            find_function(reward.function)


def pixel_reward(reward: RewardRecipe, device: torch.device) -> Reward:
    """The reward on images; of a value model, the one that it was stitched from. Raises InputError."""
    if reward.kind != "value":
        return load_reward(reward.kind, reward.model, reward.head, reward.function, device)
    stitched = read_config(Path(reward.value_model).expanduser())["reward"]
    return load_reward(stitched["kind"], stitched["path"], stitched["head"], "", device)


def load_value(recipe: SteeringRecipe, generator: Generator, shared: bool = True) -> Value:
    """The recipe's value for a generator; value models stitched to its own network use its blocks, where `shared`.

    Raises InputError where one is missing or made for another autoencoder or size.
    """
    weights = {reward.name: reward.weight for reward in recipe.rewards}
    if recipe.rewards[0].kind == "value":
        folders = {reward.name: reward.value_model for reward in recipe.rewards}
        return StitchedValue(load_for(folders, generator, shared), weights)
    rewards = {reward.name: pixel_reward(reward, generator.device) for reward in recipe.rewards}
    if recipe.estimate == "monte_carlo":
        return MonteCarloValue(rewards, weights, recipe.rollouts)
    return TweedieValue(rewards, weights)


def check_memory(
    config: Mapping[str, Any], side: int, itemsize: int, method: str, settings: Settings, tokens: int, free: int
) -> None:
    """Raise InputError where the particles do not fit into `free` bytes, for a transformer of this configuration on
    latents of `side` and `tokens` text tokens."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    kept = (tokens + (side // config["patch_size"]) ** 2) * width * itemsize
    require_memory(method, settings, 4 * config["in_channels"] * side**2, kept, free)


def check_generator_memory(generator: Generator, method: str, settings: Settings, tokens: int) -> None:
    """As `check_memory`, of a generator that is there."""
    config, side, free = generator.transformer.config, generator.latent_shape[1], free_memory(generator.device)
    check_memory(config, side, generator.dtype.itemsize, method, settings, tokens, free)


def check_memory_first(
    model: str, resolution: int | None, dtype: torch.dtype, device: torch.device, method: str, settings: Settings
) -> None:
    """As `check_memory`, of a model that is not loaded yet; one whose shape is not known here is left for later."""
    try:
        config, vae, clip_tokens = configurations(model)
    except InputError:
        return
    side = resolution // 2 ** (len(vae["block_out_channels"]) - 1) if resolution else config["sample_size"]
    free = free_memory(device)
    check_memory(config, side, dtype.itemsize, method, settings, clip_tokens + T5_LENGTH, free)


@dataclass(frozen=True)
class Pictures:
    """`images` (prompts, 3, height, width) float32 in [0, 1] on the CPU, one a prompt, and of each prompt the `trace`:
    values, effective sample sizes and ancestors by step, what came at the end and which particle was chosen."""

    images: Tensor
    trace: list[dict[str, Any]]


def steer(
    pipeline: StableDiffusion3Pipeline,
    prompts: list[str],
    method: str = "fk",
    value: Any = None,
    settings: Settings | None = None,
    *,
    negative_prompt: str = "",
    resolution: int | None = None,
    t5_length: int | None = None,
) -> Pictures:
    """Sample one picture a prompt with a Stable Diffusion 3 pipeline, steered toward what `value` likes.

    `method` is best_of_n, fk or dps; `value` a StitchedValueModel, a dict of them, a reward of images with
    score(images, prompts), or a Value of steering.values. A picture depends on the seed and on its prompt's place in
    the list, not on settings.micro_batch. The pipeline's networks are frozen and put into evaluation mode; adapters
    that are attached take part in sampling, but a value model must not run on blocks that they change.

    Raises InputError for settings, a value or a model that do not fit.
    """
    settings, chosen = settings or Settings(), as_value(value)
    settings.require_method(method)
    if not prompts:
        raise InputError("prompts must hold at least one prompt, got none")
    side = resolution or pipeline.default_sample_size * pipeline.vae_scale_factor
    generator = Generator(pipeline.transformer, pipeline.vae, pipeline.scheduler.config.shift, side)
    if isinstance(chosen, StitchedValue):
        for model in chosen.models.values():
            model.require_fit(generator)
            if model.backbone.network is generator.transformer and adapted(pipeline):
                raise InputError(
                    "the value model runs on the pipeline's own blocks, which have adapters now: load it with its own "
                    "(from_pretrained without backbone), or unload the adapters"
                )
    lengths = T5_LENGTH if pipeline.tokenizer_3 is None else min(T5_LENGTH, pipeline.tokenizer_3.model_max_length)
    conditions, negative = encode(pipeline, prompts, negative_prompt, t5_length or lengths)
    check_generator_memory(generator, method, settings, conditions.tokens.shape[1])
    denoiser = make_denoiser(generator, prompts, conditions, negative, chosen, settings)
    with progress_bar(len(prompts), method, settings) as bar:
        steered = steer_prompts(denoiser, method, chosen, settings, bar)
    with torch.no_grad():
        images = torch.cat([generator.decode(one.best).cpu() for one in steered])
    return Pictures(images, [told for one in steered for told in one.as_dicts()])


def adapted(pipeline: StableDiffusion3Pipeline) -> bool:
    """Whether adapters are attached to the pipeline's transformer."""
    return bool(getattr(pipeline.transformer, "peft_config", None))


@torch.no_grad()
def encode(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], negative_prompt: str, t5_length: int, batch: int = 16
) -> tuple[Conditions, Conditions]:
    """Conditions of the prompts, one row each, and of the negative prompt, one row; each distinct text encoded once."""
    texts = list(dict.fromkeys([*prompts, negative_prompt]))
    tokens, pooled = [], []
    for start in range(0, len(texts), batch):
        found = pipeline.encode_prompt(
            prompt=texts[start : start + batch],
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=t5_length,
        )
        tokens.append(found[0])
        pooled.append(found[2])
    table = Conditions(torch.cat(tokens), torch.cat(pooled))
    device = table.pooled.device
    rows = torch.tensor([texts.index(prompt) for prompt in prompts], device=device)
    return table.select(rows), table.select(torch.tensor([texts.index(negative_prompt)], device=device))
