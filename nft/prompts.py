"""Which prompts a run has, which of them an epoch uses, and their encoding."""

from collections.abc import Iterator

import torch
from tqdm import tqdm

from nft.config import Recipe
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.errors import InputError
from stitchvm_reward.prompts import read_prompts
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.geometry import share
from stitchvm_reward.runs.rank_sync import RankSync


def epoch_prompts(available: int, groups: int, seed: int, epoch: int) -> list[int]:
    """Return the prompt indices of an epoch's groups: an endless shuffle, with every prompt once per pass."""
    chosen = []
    for position in range(epoch * groups, (epoch + 1) * groups):
        passed, place = divmod(position, available)
        order = torch.randperm(available, generator=randomness.at(seed, randomness.PROMPTS, passed))
        chosen.append(int(order[place]))
    return chosen


def check_prompts(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return the training and the held-out prompts. Raises InputError where there are too few to evaluate on."""
    train = read_prompts(recipe.prompts.train, recipe.prompts.column, recipe.prompts.split)
    held_out = read_prompts(recipe.prompts.held_out, recipe.prompts.column, recipe.prompts.held_out_split)
    if len(held_out) < recipe.evaluation.samples:
        raise InputError(
            f"evaluation.samples is {recipe.evaluation.samples} but {recipe.prompts.held_out} holds "
            f"{len(held_out)} prompts; lower evaluation.samples or add prompts"
        )
    return train, held_out[: recipe.evaluation.samples]


def encode_prompts(recipe: Recipe, texts: list[str], ranks: RankSync) -> PromptCache:
    """Return a cache that holds what the network reads of every text; each process encodes its share.

    Raises InputError where the text encoders cannot be loaded.
    """
    accelerator = ranks.accelerator
    distinct = list(dict.fromkeys(texts))
    part = share(len(distinct), accelerator.process_index, accelerator.num_processes)

    def synced(batches: range) -> Iterator[int]:
        bar = tqdm(
            desc="encode prompts",
            total=len(batches),
            leave=False,
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )
        with bar:
            for start in ranks.rounds(batches):
                ranks.sync()
                if start is not None:
                    yield start
                    bar.update()

    with ranks.timings.phase("encode"):
        cache = PromptCache(recipe.model, recipe.prompts.cache, accelerator.device)
        with ranks.together():
            cache.ensure(distinct[part.start : part.stop], progress=synced)
    return cache
