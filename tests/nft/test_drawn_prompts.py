"""A run encodes the prompts that its epochs draw, at once or in rounds, and shares its cache with other runs."""

import shutil

import pytest
import torch

from nft.config import load_recipe
from nft.prompts import DrawnPrompts, check_prompts, epoch_prompts
from stitchvm_reward.diffusion.prompt_cache import PromptCache, bytes_per_prompt
from stitchvm_reward.errors import InputError
from tests.tiny import RECIPE, ROOT

EPOCHS, GROUPS, HELD_OUT = 3, 2, 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> str:
    """A file of 100 prompts, of which a tiny run draws six."""
    path = tmp_path_factory.mktemp("many") / "train.txt"
    lines = (ROOT / "miniature/prompts/train.txt").read_text().splitlines()
    path.write_text("\n".join(lines[:100]) + "\n")
    return f"prompts.train={path}"


@pytest.fixture
def settings(many, tmp_path):
    """settings(cache) -> overrides of a run of three epochs with that cache."""
    return lambda cache: (many, f"epochs={EPOCHS}", f"prompts.cache={tmp_path}/{cache}")


def files(folder) -> set:
    return set(folder.rglob("*.safetensors"))


def drawn(recipe, epochs) -> set[str]:
    prompts, held_out = check_prompts(recipe)
    chosen = [n for epoch in epochs for n in epoch_prompts(len(prompts), GROUPS, recipe.seed, epoch)]
    return {*(prompts[n] for n in chosen), *held_out[: recipe.evaluation.samples]}


def limit(recipe, texts: int) -> str:
    """An override to a cache that holds so many prompts; a file has a header beside the tensors."""
    return f"prompts.cache_limit={bytes_per_prompt(recipe.model) * (texts + 0.5) / 1e9}"


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The texts that are encoded during a test, in order."""
    texts, write = [], PromptCache._write
    monkeypatch.setattr(PromptCache, "_write", lambda self, text, kept: (texts.append(text), write(self, text, kept)))
    return texts


@pytest.mark.slow
def test_exactly_the_prompts_that_the_epochs_draw_are_encoded_and_the_result_is_that_of_encoding_all(
    train, digests, rows, settings, tmp_path, capsys
):
    trainer = train(tmp_path / "drawn/run", *settings("drawn/cache"))
    cache, texts = trainer.cache, drawn(trainer.recipe, range(EPOCHS))
    assert len(texts) == EPOCHS * GROUPS + HELD_OUT
    assert files(cache.folder) == {cache.path(text) for text in texts}
    assert "6 drawn and 4 held out, 0.021 MB each: 0.00021 GB" in capsys.readouterr().out

    whole = PromptCache(trainer.recipe.model, f"{tmp_path}/all/cache", CPU)
    assert whole.ensure(trainer.prompts.prompts) == 100
    train(tmp_path / "all/run", *settings("all/cache"))
    assert digests(tmp_path / "all/run", EPOCHS) == digests(tmp_path / "drawn/run", EPOCHS)
    assert rows(tmp_path / "all/run") == rows(tmp_path / "drawn/run")


@pytest.mark.slow
def test_a_cache_for_one_epoch_is_filled_in_rounds_and_never_holds_more(
    train, digests, settings, encoded, tmp_path, monkeypatch
):
    recipe = train(tmp_path / "once/run", *settings("once/cache")).recipe
    at_once, most = list(encoded), []
    prepare = DrawnPrompts.prepare

    def watched(self, epoch):
        prepare(self, epoch)
        most.append(len(files(self.cache.folder)))

    monkeypatch.setattr(DrawnPrompts, "prepare", watched)
    encoded.clear()
    train(tmp_path / "rounds/run", *settings("rounds/cache"), limit(recipe, GROUPS + HELD_OUT))
    assert encoded == at_once  # in the same order, each once: the held-out prompts stay
    assert most == [GROUPS + HELD_OUT] * 4  # at the start and before each epoch
    assert digests(tmp_path / "rounds/run", EPOCHS) == digests(tmp_path / "once/run", EPOCHS)


def test_a_cache_that_cannot_hold_one_epoch_is_refused_before_anything_is_encoded(overrides, settings, tmp_path):
    recipe = load_recipe(RECIPE, overrides(tmp_path / "run", *settings("cache")))
    recipe.prompts.cache_limit = 1e-5
    with pytest.raises(InputError, match=r"cache_limit is 1e-05 GB, but the prompts of one epoch .* 0\.000126 GB"):
        check_prompts(recipe)


@pytest.mark.slow
def test_resuming_encodes_only_what_is_left(train, settings, encoded, tmp_path):
    trainer = train(tmp_path / "run", *settings("cache"), "epochs=2")
    shutil.rmtree(tmp_path / "cache")
    encoded.clear()
    train(tmp_path / "run", *settings("cache"))
    assert sorted(encoded) == sorted(drawn(trainer.recipe, [2]))


@pytest.mark.slow
def test_prompts_that_another_run_removes_meanwhile_are_encoded_again(
    train, make_trainer, digests, settings, encoded, tmp_path
):
    train(tmp_path / "alone/run", *settings("alone/cache"))
    trainer = make_trainer(tmp_path / "disturbed/run", *settings("disturbed/cache"))
    encoded.clear()
    trainer.run_epoch()
    shutil.rmtree(tmp_path / "disturbed/cache")
    trainer.train()
    in_memory = {trainer.held_out.prompts[0]}
    assert set(encoded) == drawn(trainer.recipe, [1, 2]) - in_memory
    assert digests(tmp_path / "disturbed/run", EPOCHS) == digests(tmp_path / "alone/run", EPOCHS)


def test_an_epoch_draws_quickly_from_a_large_set():
    first = [epoch_prompts(100_000, 24, 0, epoch) for epoch in range(100)]
    assert len({n for chosen in first for n in chosen}) == 2400
