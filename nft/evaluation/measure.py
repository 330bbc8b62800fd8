"""Rewards and measures of a base and a tuned model on held-out prompts, paired by prompt and noise."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nft.config import Recipe
from nft.cost.micro_batch import device_memory, fit
from nft.export.lora import attach_lora, lora_layers
from nft.models import load_generator
from nft.preflight import check_inputs
from nft.rollout import sample
from nft.scoring import Scorer
from nft.untrained import UntrainedLatents
from stitchvm_reward.bootstrap import mean_interval
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.errors import InputError
from stitchvm_reward.prompts import read_prompts
from stitchvm_reward.rewards import check_finite
from stitchvm_reward.runs import randomness


def _ends(scores: np.ndarray) -> tuple[float, float]:
    """Return the ends of the interval of the mean of (count,) scores, over prompts: there is one seed of the noise."""
    found = mean_interval(scores[None])
    return found.low, found.high


def compare(name: str, base: np.ndarray, tuned: np.ndarray | None) -> dict[str, Any]:
    """Return the row of one measure: means of (count,) scores and, with a tuned model, the paired difference.

    The difference is tuned - base. Intervals are those of `bootstrap.mean_interval`, over prompts. A row also has the
    shares of prompts that became better and worse.
    """
    row: dict[str, Any] = {"measure": name, "base": float(base.mean()), "base_interval": _ends(base)}
    if tuned is not None:
        difference = tuned - base
        row |= {
            "tuned": float(tuned.mean()),
            "difference": float(difference.mean()),
            "difference_interval": _ends(difference),
            "improved": float((difference > 0).mean()),
            "worse": float((difference < 0).mean()),
        }
    return row


def held_out_prompts(recipe: Recipe, count: int | None) -> list[str]:
    """Return the first `count` held-out prompts of a recipe, by default as many as its evaluation uses.

    Raises InputError where there are fewer, or where the count leaves nothing to compare.
    """
    count = recipe.evaluation.samples if count is None else count
    if count < 2:
        raise InputError(f"--count must be at least 2 to estimate a spread, got {count}")
    prompts = read_prompts(recipe.prompts.held_out, recipe.prompts.column, recipe.prompts.held_out_split)
    if len(prompts) < count:
        raise InputError(f"{recipe.prompts.held_out} holds {len(prompts)} prompts, {count} were requested")
    return prompts[:count]


@torch.no_grad()
def evaluate_images(
    recipe: Recipe, lora: Path | None, count: int | None, seed: int | None, device: torch.device
) -> list[dict[str, Any]]:
    """Return a row of `compare` for every reward, their sum `total` and every measure of a recipe.

    Images are sampled as in the recipe's evaluation: the same prompts, noise (of `seed`, by default the recipe's),
    Euler steps and size, without classifier-free guidance. Raises InputError for bad input, before weights are loaded
    where possible.
    """
    if lora is not None:
        lora_layers(lora)
    check_inputs(recipe)
    prompts = held_out_prompts(recipe, count)
    cache = PromptCache(recipe.model, recipe.prompts.cache, device)
    cache.ensure(prompts, progress=lambda items: tqdm(items, desc="encode prompts", leave=False))
    scorer = Scorer(recipe.rewards, recipe.evaluation.metrics, device)
    generator = load_generator(recipe, device)
    network: Any = generator.transformer
    names = ["base"] if lora is None else ["base", "tuned"]
    if lora is not None:
        attach_lora(network, lora)
    sigmas = generator.sigmas(recipe.evaluation.steps)
    untrained = UntrainedLatents(recipe.evaluation.cache, recipe.model, generator)
    parts_of: dict[str, dict[str, list[Tensor]]] = {name: {} for name in names}
    size = fit(recipe, 1, device_memory()).evaluation.micro_batch
    for start in tqdm(range(0, len(prompts), size), desc="sample and score", leave=False, dynamic_ncols=True):
        indices = list(range(start, min(start + size, len(prompts))))
        texts = [prompts[index] for index in indices]
        noise_seed = recipe.seed if seed is None else seed
        noise = randomness.noise(generator.latent_shape, noise_seed, randomness.EVALUATION, 0, indices)
        conditions = cache.conditions(texts)
        make = partial(sample, generator, network, conditions, noise, sigmas)
        for name in names:
            if lora is not None:
                (network.enable_lora if name == "tuned" else network.disable_lora)()
            latents = make() if name == "tuned" else untrained.get(conditions, noise, sigmas, make)
            for measure, scores in scorer.measure(generator.decode(latents), texts).items():
                parts_of[name].setdefault(measure, []).append(scores.double().cpu())
    whole = {name: {key: torch.cat(parts).numpy() for key, parts in parts_of[name].items()} for name in names}
    for scores_of in whole.values():
        for name in [*scorer.rewards, "total"]:
            check_finite(name, torch.from_numpy(scores_of[name]))
    return [compare(key, values, whole.get("tuned", {}).get(key)) for key, values in whole["base"].items()]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    if "tuned" not in rows[0]:
        lines = [f"{'measure':18}{'base':>9}  95% interval over prompts"]
        for row in rows:
            low, high = row["base_interval"]
            lines.append(f"{row['measure']:18}{row['base']:9.3f}  [{low:.3f}, {high:.3f}]")
        return "\n".join(lines)
    header = f"{'measure':18}{'base':>9}{'tuned':>9}{'difference':>12}  {'95%, over prompts':18}"
    lines = [f"{header}{'improved':>9}{'worse':>8}"]
    for row in rows:
        low, high = row["difference_interval"]
        lines.append(
            f"{row['measure']:18}{row['base']:9.3f}{row['tuned']:9.3f}{row['difference']:+12.3f}  "
            f"{f'[{low:+.3f}, {high:+.3f}]':18}{row['improved']:9.1%}{row['worse']:8.1%}"
        )
    return "\n".join(lines)
