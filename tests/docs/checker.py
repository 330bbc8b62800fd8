"""Checks of what documents say: commands, recipes, Python, names in the text, and links. Nothing is run.

A fenced block is `sh`, `python`, `yaml` or `text`, and only `text` is not checked. A YAML block is a recipe or a part
of one; a comment before it, `<!-- docs check: over FILE -->`, names the recipe file that it is merged over.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import itertools
import re
import runpy
import shlex
import sys
import tempfile
import typing
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

from stitchvm_reward.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MARKER = re.compile(r"<!-- docs check: over (\S+) -->")
LANGUAGES = ("sh", "python", "yaml", "text")
# Programs that are not ours: whether their arguments are right cannot be checked here.
FOREIGN = {"cd", "export", "git", "hf", "pip", "squeue", "tensorboard", "wandb"}
# What stands for a recipe of the reader's own.
PLACEHOLDERS = {"RECIPE": "recipes/shapes/aesthetic.yaml", "STITCH_RECIPE": "recipes/stitch/shapes_aesthetic.yaml"}
PACKAGES = ("nft", "stitchvm_reward", "miniature", "tests")
FOLDERS = (*PACKAGES, "docs", "launch", "recipes")
OUTPUT = re.compile(r"^miniature/weights/")  # also written by commands


class WrongDocument(Exception):
    """What a document says and is not so."""


class _Parsed(BaseException):
    """Ends a program as soon as it has parsed its arguments."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text, and the recipe file that it is merged over."""

    line: int
    language: str
    text: str
    base: str | None


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a Markdown text. Raises WrongDocument for one that is not closed."""
    result: list[Block] = []
    base: str | None = None
    opened: tuple[int, str] | None = None
    kept: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if opened is not None:
            if line.strip() == "```":
                result.append(Block(opened[0], opened[1], "\n".join(kept), base))
                base, opened, kept = None, None, []
            else:
                kept.append(line)
        elif line.startswith("```"):
            opened = (number, line[3:].strip())
        elif found := MARKER.fullmatch(line.strip()):
            base = found[1]
        elif line.strip():
            base = None
    if opened is not None:
        raise WrongDocument(f"line {opened[0]}: the block is not closed")
    return result


def prose(text: str) -> str:
    """Return a Markdown text without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


# Commands


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell script; loops are unrolled, pipes and functions are not understood."""
    loops: list[tuple[str, list[str]]] = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip()
        if found := re.fullmatch(r"for (\w+) in (.*); do", line):
            loops.append((found[1], shlex.split(found[2])))
        elif line == "done":
            loops.pop()
        else:
            for values in itertools.product(*(values for _, values in loops)):
                expanded = line
                for (name, _), value in zip(loops, values):
                    expanded = re.sub(rf"\$({name}\b|{{{name}}})", value, expanded)
                if found := re.fullmatch(r"\w+=\$\((.*)\)", expanded):
                    expanded = found[1]
                yield from _split(shlex.split(expanded, comments=True))


def _split(words: list[str]) -> Iterator[list[str]]:
    for together, group in itertools.groupby(words, lambda word: word in ("&&", ";")):
        command = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), group))
        if command and not together:
            yield command


def check_command(words: list[str]) -> None:
    """Check one command of ours. Raises WrongDocument."""
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for target in arguments:
            _require(target in targets, f"make has no target {target}")
    elif program in ("python", ".venv/bin/python"):
        _require(bool(arguments), "python without a script")
        if arguments[0] == "-m":
            check_program(arguments[1], arguments[2:])
        else:
            check_program(arguments[0], arguments[1:])
    elif program == "torchrun" or words[:2] == ["accelerate", "launch"]:
        place = next((number for number, word in enumerate(arguments) if word.endswith(".py")), None)
        if place is None:
            raise WrongDocument(f"{program} without a script")
        options = arguments[:place]
        if "--config_file" in options:
            _require_file(options[options.index("--config_file") + 1])
        check_program(arguments[place], arguments[place + 1 :])
    elif program == "sbatch":
        _check_sbatch(arguments)
    else:
        _require(program in FOREIGN, f"{program} is not a command that the docs check knows")


def _check_sbatch(arguments: list[str]) -> None:
    if "--wrap" in arguments:
        for command in commands(arguments[arguments.index("--wrap") + 1]):
            check_command(command)
        return
    place = next((number for number, word in enumerate(arguments) if word.endswith(".sbatch")), None)
    if place is None:
        raise WrongDocument("sbatch without a script")
    _require_file(arguments[place])
    check_recipe("training", arguments[place + 1], arguments[place + 2 :])


def check_program(name: str, arguments: list[str]) -> None:
    """Check a script's or a module's name, its arguments and the recipes that they name. Raises WrongDocument."""
    module = _load(name)
    parsed = _parse(module, name, arguments)
    for word in arguments:
        if word.startswith("recipes/"):
            _require_file(word)
    if isinstance(parsed, argparse.Namespace):
        _check_recipes(name, parsed)


@cache
def _load(name: str) -> ModuleType:
    path = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
    _require(path.is_file(), f"{name} does not exist")
    paths = list(sys.path)
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        raise WrongDocument(f"{name} cannot be imported: {error}") from None
    finally:
        sys.path[:] = paths  # a script makes the repository's root its own folder


def _parse(module: Any, name: str, arguments: list[str]) -> Any:
    """Return what a program makes of its arguments. Raises WrongDocument if it refuses them."""
    if "ArgumentParser" not in inspect.getsource(module):
        _require(not arguments, f"{name} takes no arguments, got {' '.join(arguments)}")
        return None
    given, original, messages = sys.argv, argparse.ArgumentParser.parse_args, io.StringIO()

    def stop(self: argparse.ArgumentParser, *positional: Any, **named: Any) -> None:
        raise _Parsed(original(self, *positional, **named))

    sys.argv = [name, *arguments]
    try:
        with contextlib.redirect_stderr(messages), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a module that is run although it is imported
            if hasattr(module, "parse"):
                return module.parse()
            argparse.ArgumentParser.parse_args = stop  # type: ignore[assignment, method-assign]
            runpy.run_module(module.__name__, run_name="__main__")
    except _Parsed as parsed:
        return parsed.args[0]
    except SystemExit:
        raise WrongDocument(f"{name}: {(messages.getvalue().strip().splitlines() or ['it exits'])[-1]}") from None
    finally:
        sys.argv, argparse.ArgumentParser.parse_args = given, original  # type: ignore[method-assign]
    raise WrongDocument(f"{name} parses no arguments")


# Recipes


def check_recipe(kind: str, path: str, overrides: list[str]) -> Any:
    """Load a recipe of a kind with its overrides. Raises WrongDocument."""
    from nft.config import load_recipe
    from stitchvm_reward.runs.recipe import read_recipe
    from stitchvm_reward.steering.evaluate import ComparisonRecipe
    from stitchvm_reward.steering.settings import SteeringRecipe
    from stitchvm_reward.stitching.config import load_stitch_recipe

    path = PLACEHOLDERS.get(path, path)
    try:
        if kind == "training":
            return load_recipe(path, overrides)
        if kind == "stitching":
            return load_stitch_recipe(path, overrides)
        return read_recipe(SteeringRecipe if kind == "steering" else ComparisonRecipe, path, overrides)
    except InputError as error:
        raise WrongDocument(f"{path}: {error}") from None


def kind_of(path: str) -> str:
    """Return the kind of a recipe that lies in this repository."""
    folder = Path(path).parent.name
    if folder == "steer":
        return "comparison" if Path(path).name.startswith("compare") else "steering"
    return "stitching" if folder == "stitch" else "training"


def _check_recipes(name: str, parsed: argparse.Namespace) -> None:
    """Load the recipes that a program would load."""
    recipe, overrides = getattr(parsed, "recipe", None), getattr(parsed, "overrides", [])
    try:
        if name == "launch/sample.py" and parsed.steering is not None:
            check_recipe("steering", parsed.steering, parsed.set).require_method(parsed.steer)
        elif name == "launch/evaluate.py" and parsed.command == "value" and parsed.truth is not None:
            _resolve(parsed.truth.replace(":", "."))
        elif recipe is not None:
            kinds = {"launch/stitch.py": "stitching", "launch/evaluate.py": "training"}
            kind = kinds.get(name, "training")
            if name == "launch/evaluate.py" and parsed.command == "steering":
                kind = "comparison"
            elif name == "launch/benchmark.py":
                kind = kind_of(PLACEHOLDERS.get(str(recipe), str(recipe)))
            if name == "launch/stitch.py" and recipe == "RECIPE":
                recipe = "STITCH_RECIPE"
            check_recipe(kind, str(recipe), overrides)
    except InputError as error:
        raise WrongDocument(f"{name}: {error}") from None


def check_yaml(block: Block) -> None:
    """Load a YAML block, merged over the recipe that its marker names. Raises WrongDocument."""
    if block.base is None:
        raise WrongDocument("a YAML block needs a comment before it that names its base")
    _require_file(block.base)
    content: Any = OmegaConf.to_container(OmegaConf.create(block.text))
    own = content.get("base")
    _require(own is None or (ROOT / block.base).parent.joinpath(own).is_file(), f"base: {own} does not exist")
    content["base"] = str((ROOT / block.base).parent / own if own else ROOT / block.base)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        OmegaConf.save(OmegaConf.create(content), path)
        check_recipe(kind_of(block.base), str(path), [])


# Python and names


def check_python(text: str) -> None:
    """Compile Python code and resolve what it imports. Raises WrongDocument."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise WrongDocument(f"line {error.lineno} of the block is not Python: {error.msg}") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _resolve(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                _resolve(f"{node.module}.{alias.name}")


@cache
def _resolve(name: str) -> Any:
    """Return the module, or the attribute of one, of this dotted name. Raises WrongDocument where there is none."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(words[:length]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise WrongDocument(f"{name} cannot be imported: {error}") from None
            continue
        except ImportError as error:
            raise WrongDocument(f"{name} cannot be imported: {error}") from None
        for word in words[length:]:
            annotations = getattr(found, "__annotations__", {})
            if not hasattr(found, word) and word not in annotations:
                raise WrongDocument(f"{name} does not exist")
            found = getattr(found, word, None)
        return found
    raise WrongDocument(f"{name} does not exist")


@cache
def _recipe_keys() -> dict[str, set[str]]:
    """Return the keys of each section of every kind of recipe."""
    from nft.config import Recipe
    from stitchvm_reward.steering.settings import SteeringRecipe
    from stitchvm_reward.stitching.config import StitchRecipe

    keys: dict[str, set[str]] = {}
    for kind in (Recipe, StitchRecipe, SteeringRecipe):
        hints = typing.get_type_hints(kind)
        for name, hint in hints.items():
            inner = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
            if dataclasses.is_dataclass(inner):
                keys.setdefault(name, set()).update(field.name for field in dataclasses.fields(inner))
    return keys


def check_name(span: str) -> None:
    """Check a name that stands in the text as code: a module, a recipe key or a file. Raises WrongDocument."""
    if re.fullmatch(r"([\w-]+/)*test_\w+\.py", span):
        _require(any(ROOT.joinpath("tests").rglob(span)) or (ROOT / span).is_file(), f"no test {span} exists")
    elif re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", span):
        _resolve(span)
    elif found := re.fullmatch(r"(\w+)\.(\w+)(: .*|=.*)?", span):
        section, key = found[1], found[2]
        known = _recipe_keys().get(section)
        file = key in ("yaml", "py", "json", "md", "png", "txt", "safetensors", "jsonl", "pt")
        _require(known is None or file or key in known, f"no recipe has a key {section}.{key}")
    elif re.search(r"\b[A-Z]{3,}\b", span) and not re.search(r"README|BENCHMARKS", span):
        return  # a placeholder
    elif re.fullmatch(r"[\w./*-]+", span) and span.split("/")[0] in FOLDERS and not OUTPUT.match(span):
        _require(any(ROOT.glob(span.rstrip("/"))), f"{span} does not exist")


def check_link(target: str, folder: Path, headings: Callable[[Path], set[str]]) -> None:
    """Check a link to a file or a heading. Raises WrongDocument."""
    if re.match(r"[a-z]+:", target):
        return
    name, _, heading = target.partition("#")
    path = folder / name if name else None
    _require(path is None or path.exists(), f"the link {target} leads nowhere")
    if heading and (path is None or path.suffix == ".md"):
        _require(heading in headings(path or folder), f"the link {target} names a heading that does not exist")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise WrongDocument(message)


def _require_file(name: str) -> None:
    _require((ROOT / name).is_file(), f"{name} does not exist")


# Documents


def headings(text: str) -> set[str]:
    """Return the anchors of a Markdown text's headings, as hosts of repositories make them."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def mistakes(path: Path, labelled: bool = True) -> list[str]:
    """Return all that is wrong in a document, with line numbers.

    Without `labelled`, a block that names no language is a shell script.
    """
    text, result = path.read_text(), []

    def attempt(where: str, check: Callable[..., Any], *arguments: Any) -> None:
        try:
            check(*arguments)
        except WrongDocument as error:
            result.append(f"{path.relative_to(ROOT)}{where}: {error}")

    for block in blocks(text):
        where = f":{block.line}"
        if block.language == "sh" or (not block.language and not labelled):
            for command in commands(block.text):
                attempt(where, check_command, command)
        elif block.language == "python":
            attempt(where, check_python, block.text)
        elif block.language == "yaml":
            attempt(where, check_yaml, block)
        else:
            attempt(where, _require, block.language in LANGUAGES, f"a block of language {block.language!r}")
    for number, line in enumerate(re.sub(r"<!--.*?-->", "", text).splitlines(), 1):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            attempt(
                f":{number}",
                check_link,
                target,
                path.parent,
                lambda file: headings((file if file.is_file() else path).read_text()),
            )
    for span in dict.fromkeys(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text))):
        attempt("", check_name, span)
    return result
