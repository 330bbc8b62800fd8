"""The miniature's tokenizers: real CLIP and T5 tokenizer classes over a fixed vocabulary of this world's words."""

import string

from transformers import CLIPTokenizer, T5Tokenizer

LENGTH = 13  # tokens a caption may take with its start and end marks, in either tokenizer

WORDS = (
    "a one two three red yellow green blue purple circle square triangle cross circles squares triangles crosses "
    "above below left right of and with on white grey black background picture scene vivid pale large small"
).split()


def _merge(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Apply byte-pair merges in rank order, as the CLIP tokenizer does."""
    parts = [*word[:-1], word[-1] + "</w>"]
    for first, second in merges:
        index = 0
        while index < len(parts) - 1:
            if (parts[index], parts[index + 1]) == (first, second):
                parts[index : index + 2] = [first + second]
            index += 1
    return parts


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Every word of this world is one token; other words fall back to letters."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        while len(parts := _merge(word, merges)) > 1:
            merges.append((parts[0], parts[1]))
    characters = string.ascii_lowercase + string.digits + ",.!'-"
    pieces = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for mark in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[mark] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """Words with a leading space mark, and letters for everything else."""
    words = [("▁" + word, -1.0) for word in WORDS]
    letters = [(c, -8.0) for c in string.ascii_lowercase + string.digits + ".!'-▁"]
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    return T5Tokenizer(vocab=[*marks, *words, *letters, (",", -1.0)], extra_ids=0, model_max_length=LENGTH)
