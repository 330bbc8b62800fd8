"""The one exception that stands for a user's mistake."""

from difflib import get_close_matches


class InputError(Exception):
    """Bad input, told in one line: the rule, what was given, what to do. Commands print it and exit with 2."""


class SharedError(InputError):
    """A mistake or failure that every process knows of: only the first of them tells it."""


def nearest(word: str, known: list[str]) -> str:
    """A hint naming the nearest known word, or listing them when none is near."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
