"""Recipes: typed dataclasses read from YAML with `base:` and key=value overrides; mistakes are reported in one line."""

import dataclasses
import io
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from stitchvm_reward.errors import InputError, nearest
from stitchvm_reward.secrets import refuse_secrets

REFERENCE = re.compile(r"\$\{[\w.\[\]]+\}")  # to another key; see `_only_references`
DTYPES = ("float32", "bfloat16", "float16")
Kind = typing.TypeVar("Kind")


def require(holds: bool, rule: str, given: Any) -> None:
    """Raise InputError with the rule and the given value, unless the rule holds."""
    if not holds:
        raise InputError(f"{rule}, got {given!r}")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, f"{name} must be one of {', '.join(allowed)}", value)


def at_least(name: str, value: float, least: float) -> None:
    require(least <= value < math.inf, f"{name} must be at least {least}, and finite", value)


def positive(name: str, value: float) -> None:
    require(0 < value < math.inf, f"{name} must be positive and finite", value)


@dataclass
class CheckpointRecipe:
    every: int = 10
    """Epochs between checkpoints; the last epoch is always saved."""
    keep: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every: int = 0
    """In addition, keep every checkpoint whose epoch is a multiple of this; 0: none."""
    resume: str = "auto"
    """auto (the newest complete checkpoint, or a fresh start), never, or the name of a checkpoint in the run folder."""

    def __post_init__(self):
        at_least("checkpoint.every", self.every, 1)
        at_least("checkpoint.keep", self.keep, 1)
        at_least("checkpoint.keep_every", self.keep_every, 0)


def _known_keys(kind: Any, given: Any, where: str) -> None:
    """Raise InputError for keys that the dataclass does not have, with the nearest existing key."""
    if not isinstance(given, dict):
        return
    hints = typing.get_type_hints(kind)
    for key, value in given.items():
        if key not in hints:
            raise InputError(f"unknown recipe key {where}{key}: {nearest(str(key), list(hints))}")
        inner = hints[key]
        if dataclasses.is_dataclass(inner):
            if not isinstance(value, dict):
                raise InputError(f"{where}{key} must be a section with keys, got {value!r}")
            _known_keys(inner, value, f"{where}{key}.")
        elif typing.get_origin(inner) is list:
            if not isinstance(value, list):
                raise InputError(f"{where}{key} must be a list, got {value!r}")
            element = typing.get_args(inner)[0]
            for index, item in enumerate(value):
                if dataclasses.is_dataclass(element):
                    _known_keys(element, item, f"{where}{key}[{index}].")


def _only_references(content: Any, where: str) -> None:
    """Raise InputError for a value ${...} that is more than a reference to another key.

    Recipes are passed on. OmegaConf's functions, such as oc.env, would let one read a token into what a run writes.
    """
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        _only_references(value, where)
    if isinstance(content, str) and "${" in REFERENCE.sub("", content):
        raise InputError(
            f"{where} must not read the environment or call functions: ${{...}} may only name another key, as "
            f"${{model.path}} does, got {content[:80]!r}; give the value as an override on the command line"
        )


def _read_file(path: Path) -> tuple[dict[str, Any], Path | None]:
    """Return the keys of one recipe file and the path of its `base:` file, if any."""
    if not path.is_file():
        raise InputError(f"recipe not found: {path}")
    try:
        text = path.read_text(encoding="utf-8")
        refuse_secrets(text, f"recipe {path}")  # before an error could show a part of it
        content: Any = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold recipe keys, got {content!r}")
    _only_references(content, str(path))
    base = content.pop("base", None)
    if not isinstance(base, str | None):
        raise InputError(f"base must be a file name, got {base!r} in {path}")
    return content, None if base is None else path.parent / base


def _read_yaml(kind: type | None, path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a recipe file merged over its `base:` files; `below` are the files that lead here."""
    if path.resolve() in below:
        raise InputError(f"{path} is its own base; a base must be another file")
    content, base = _read_file(path)
    if kind is not None:
        _known_keys(kind, content, "")
    whole: Any = OmegaConf.create(content)
    if base is not None:
        whole = OmegaConf.merge(OmegaConf.create(_read_yaml(kind, base, (*below, path.resolve()))), whole)
    return typing.cast(dict[str, Any], OmegaConf.to_container(whole))


def recipe_keys(path: str | Path) -> set[str]:
    """Return the top-level keys of a recipe file and its `base:` files. Raises InputError for an unreadable file."""
    return set(_read_yaml(None, Path(path)))


def read_recipe(kind: type[Kind], path: str | Path, overrides: list[str] | None = None) -> Kind:
    """Read a recipe file as a dataclass, apply `section.key=value` overrides and run the dataclass's checks.

    Raises InputError for unknown keys (with the nearest known key), wrong types and values out of range.
    """
    content = _read_yaml(kind, Path(path))
    for override in overrides or []:
        refuse_secrets(override, "an override")
        if "=" not in override.lstrip("="):
            raise InputError(f"an override is written key=value, got {override!r}")
        try:
            OmegaConf.from_dotlist([override])
        except YAMLError:
            raise InputError(f"the value of override {override!r} is not valid YAML") from None
    try:
        given = OmegaConf.from_dotlist(list(overrides or []))
        _known_keys(kind, OmegaConf.to_container(given), "")
        _only_references(OmegaConf.to_container(given), "an override")
        merged = OmegaConf.merge(OmegaConf.create(content), given)
        whole = OmegaConf.merge(OmegaConf.structured(kind), merged)
        missing = sorted(OmegaConf.missing_keys(whole))
        if missing:
            raise InputError(f"the recipe must also set {', '.join(missing)}")
        return typing.cast(Kind, OmegaConf.to_object(whole))
    except (OmegaConfBaseException, YAMLError) as error:
        first = str(error).splitlines()[0]
        key = getattr(error, "full_key", None)
        raise InputError(f"recipe key {key}: {first}" if key else f"recipe: {first}") from None


def require_trust(code: list[str], trusted: bool, *paths: str | Path) -> None:
    """Raise InputError where recipe files that have been read would run `code`, unless that is safe.

    It is safe if the user says so (`trusted`), or if the files and all their `base:` files lie in the current folder,
    among the user's own code. Call this before anything of `code` is imported.
    """
    for first in paths if code and not trusted else ():
        path: Path | None = Path(first)
        while path is not None:
            if not path.resolve().is_relative_to(Path.cwd()):
                raise InputError(
                    f"{path} lies outside the current folder, and the recipe runs code: {', '.join(code)}; read that "
                    "code, then add --trust-code, or copy the recipe into the current folder"
                )
            path = _read_file(path)[1]


def dump(recipe: Any) -> str:
    """Return the resolved recipe as YAML. Raises InputError if it contains a secret of the environment."""
    text = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe)))
    refuse_secrets(text, "a recipe")
    return text
