"""The exceptions that stand for a user's mistake."""

from difflib import get_close_matches


class InputError(Exception):
    """A mistake in the input, in one line: the rule, the value given, what to do. Commands print it and exit with 2."""


class SharedError(InputError):
    """A mistake or failure that all processes know of; only the first process prints it."""


def nearest(word: str, known: list[str]) -> str:
    """Return a hint: the nearest known word or, if none is near, all of them."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
