"""Which prompts a run has, which of them an epoch uses, and their encoding."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from tqdm import tqdm

from nft.config import Recipe
from stitchvm_reward.cache_folder import GB, make_room
from stitchvm_reward.diffusion.prompt_cache import PromptCache, bytes_per_prompt
from stitchvm_reward.errors import InputError
from stitchvm_reward.prompts import read_prompts
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.rank_sync import RankSync


@lru_cache(maxsize=2)  # an epoch may end one pass and begin the next
def _shuffled(available: int, seed: int, passed: int) -> Tensor:
    return torch.randperm(available, generator=randomness.at(seed, randomness.PROMPTS, passed))


def epoch_prompts(available: int, groups: int, seed: int, epoch: int) -> list[int]:
    """Return the prompt indices of an epoch's groups: an endless shuffle, with every prompt once per pass."""
    places = (divmod(position, available) for position in range(epoch * groups, (epoch + 1) * groups))
    return [int(_shuffled(available, seed, passed)[place]) for passed, place in places]


def check_prompts(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return all training and held-out prompts; evaluations take the first `evaluation.samples` of the latter.

    Raises InputError where there are too few to evaluate on, or where the cache is too small for one epoch.
    """
    train = read_prompts(recipe.prompts.train, recipe.prompts.column, recipe.prompts.split)
    held_out = read_prompts(recipe.prompts.held_out, recipe.prompts.column, recipe.prompts.held_out_split)
    if len(held_out) < recipe.evaluation.samples:
        raise InputError(
            f"evaluation.samples is {recipe.evaluation.samples} but {recipe.prompts.held_out} holds "
            f"{len(held_out)} prompts; lower evaluation.samples or add prompts"
        )
    least = (min(len(train), recipe.rollout.groups) + recipe.evaluation.samples) * bytes_per_prompt(recipe.model)
    if least > recipe.prompts.cache_limit * GB:
        raise InputError(
            f"prompts.cache_limit is {recipe.prompts.cache_limit:g} GB, but the prompts of one epoch and the held-out "
            f"ones take {least / GB:.3g} GB: raise it"
        )
    return train, held_out


def in_rounds(recipe: Recipe) -> bool:
    """Return whether the prompts that a run draws may exceed the cache's limit.

    Raises InputError for a model whose shapes are not known.
    """
    most = recipe.epochs * recipe.rollout.groups + recipe.evaluation.samples
    return most * bytes_per_prompt(recipe.model) > recipe.prompts.cache_limit * GB


def cache_line(recipe: Recipe, available: int | None = None) -> str:
    """Say how many prompts a run draws and what they take on disk, as far as the recipe and their number tell.

    Raises InputError for a model whose shapes are not known.
    """
    drawn, held_out = recipe.epochs * recipe.rollout.groups, recipe.evaluation.samples
    drawn, of = (drawn, "at most ") if available is None else (min(drawn, available), "")
    each, limit = bytes_per_prompt(recipe.model), recipe.prompts.cache_limit * GB
    total = (drawn + held_out) * each
    rounds = "" if total <= limit else ", encoded in rounds"
    return (
        f"prompts      {of}{drawn:,} drawn and {held_out:,} held out, {each / 1e6:.3g} MB each: {total / GB:.3g} GB in "
        f"{recipe.prompts.cache} (limit {recipe.prompts.cache_limit:g} GB{rounds})"
    )


class DrawnPrompts:
    """Encodes what a run's epochs draw, and the held-out prompts: all of it at once where it fits the cache's limit.

    Otherwise it is encoded in rounds of as many epochs as fit, each just before its first epoch. Each process encodes
    its share. `first` is the epoch that the run begins or continues with.
    """

    def __init__(self, recipe: Recipe, prompts: list[str], held_out: list[str], *, first: int, ranks: RankSync):
        self.recipe, self.prompts, self.held_out, self.ranks = recipe, prompts, held_out, ranks
        self.cache = PromptCache(recipe.model, recipe.prompts.cache, ranks.accelerator.device)
        self.encoded: range | None = None  # epochs
        if ranks.accelerator.is_main_process:
            tqdm.write(cache_line(recipe, len(prompts)))
        self.prepare(first)

    def _texts(self, epoch: int) -> list[str]:
        chosen = epoch_prompts(len(self.prompts), self.recipe.rollout.groups, self.recipe.seed, epoch)
        return [self.prompts[index] for index in chosen]

    def _round(self, first: int) -> tuple[range, list[str]]:
        """Return the epochs whose prompts fit the cache together, at least one, and all texts that these need."""
        fit = self.recipe.prompts.cache_limit * GB // bytes_per_prompt(self.recipe.model)
        texts = dict.fromkeys(self.held_out)
        for epoch in range(first, self.recipe.epochs):
            more = texts | dict.fromkeys(self._texts(epoch))
            if len(more) > fit and epoch > first:
                return range(first, epoch), list(texts)
            texts = more
        return range(first, self.recipe.epochs), list(texts)

    def prepare(self, epoch: int) -> None:
        """Encode the round that begins with an epoch, on all processes together; do nothing within a round.

        Raises InputError where the text encoders cannot be loaded, or the cache cannot be written.
        """
        if self.encoded is not None and epoch in self.encoded:
            return
        self.encoded, texts = self._round(epoch)
        with self.ranks.timings.phase("encode"), self.ranks.together():
            accelerator = self.ranks.accelerator
            if accelerator.is_main_process:
                self._make_room(texts)
            # Every n-th text: those that are encoded already are next to each other.
            self.cache.ensure(texts[accelerator.process_index :: accelerator.num_processes], progress=self._synced)

    def _make_room(self, texts: list[str]) -> None:
        each, missing = bytes_per_prompt(self.recipe.model), self.cache.missing(texts)
        keep = {self.cache.path(text) for text in texts}
        limit = self.recipe.prompts.cache_limit * GB
        make_room(self.cache.folder, limit, len(missing) * each, keep)

    def _synced(self, batches: range) -> Iterator[int]:
        """Yield this process's batches under a progress bar; before each, all processes meet and may stop."""
        main = self.ranks.accelerator.is_main_process
        bar = tqdm(desc="encode prompts", total=len(batches), leave=False, disable=not main, dynamic_ncols=True)
        with bar:
            for start in self.ranks.rounds(batches):
                self.ranks.sync()
                if start is not None:
                    yield start
                    bar.update()
