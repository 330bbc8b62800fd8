"""Both tokenizers know this world's words and fit its captions."""

import pytest

from miniature.scenes import draw_scenes
from miniature.wording import LENGTH, WORDS, clip_tokenizer, t5_tokenizer

MAKERS = {"clip": clip_tokenizer, "t5": t5_tokenizer}
MARKS = {"clip": 2, "t5": 1}
ODD = ["", "a zebra, 2 dogs!", "RED Circle", "on"]


@pytest.fixture(params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(kind):
    return MAKERS[kind]()


@pytest.fixture(scope="module")
def captions():
    return [scene.caption for held_out in (False, True) for scene in draw_scenes(1500, seed=31, held_out=held_out)]


def test_every_word_is_one_token_of_its_own(kind, tokenizer):
    found = [tokenizer(word).input_ids for word in WORDS]
    assert all(len(ids) == 1 + MARKS[kind] for ids in found)
    assert len({tuple(ids) for ids in found}) == len(WORDS)


def test_every_word_is_one_token_in_the_middle_of_a_caption(kind, tokenizer):
    text = " ".join(["red", *WORDS])
    assert len(tokenizer(text, truncation=False).input_ids) == 1 + len(WORDS) + MARKS[kind]


def test_the_longest_captions_fit(tokenizer, captions):
    longest = max(len(ids) for ids in tokenizer(captions, truncation=False).input_ids)
    assert longest <= LENGTH == tokenizer.model_max_length


def test_captions_hold_no_unknown_token(kind, tokenizer, captions):
    ids = {token for caption in tokenizer(captions).input_ids for token in caption}
    if kind == "t5":
        assert tokenizer.unk_token_id not in ids
    assert max(ids) < len(tokenizer)


def test_different_captions_have_different_tokens(tokenizer, captions):
    distinct = sorted(set(captions))
    assert len({tuple(ids) for ids in tokenizer(distinct).input_ids}) == len(distinct)


def test_captions_are_padded_to_one_length(tokenizer, captions):
    ids = tokenizer(captions[:50], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (50, LENGTH)


def test_a_saved_tokenizer_is_the_same(tokenizer, captions, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    options = {"padding": "max_length", "truncation": True}
    texts = [*captions[:300], *ODD]
    assert again(texts, **options).input_ids == tokenizer(texts, **options).input_ids
    assert len(again) == len(tokenizer) and again.model_max_length == LENGTH
    assert (again.pad_token_id, again.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
