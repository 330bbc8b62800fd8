"""The structure of the code: families in one place, no import cycle, short functions and files."""

import ast
import re
from pathlib import Path

import pytest

from tests.tiny import ROOT

PACKAGES = ("launch", "nft", "stitchvm_reward")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# What only a family may name. The issue that asked for families has the same expression.
FAMILY = re.compile(r"SD3|StableDiffusion3|stable-diffusion|pooled|attn2|joint_attention")
LONGEST_FUNCTION, LONGEST_FILE, MOST_POSITIONAL = 80, 400, 5


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path, inside_functions: bool = True) -> set[str]:
    """Return the project's modules that a file imports; those under TYPE_CHECKING are included.

    An import inside a function runs when the function is called, which cannot make a cycle at import time, but is
    counted unless `inside_functions` is False.
    """
    module = tree(path)
    skipped: set[ast.AST] = set()
    if not inside_functions:
        for function in ast.walk(module):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                skipped |= set(ast.walk(function))
    found = set()
    for node in ast.walk(module):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # `from package import module` imports the module, `from module import name` only the module.
            found |= {
                full if (full := f"{node.module}.{alias.name}") in MODULES else str(node.module) for alias in node.names
            }
    return found & MODULES.keys()


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one cycle, the first of them twice; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, stack: list[str]) -> list[str]:
        if name in stack:
            return [*stack[stack.index(name) :], name]
        if name not in done:
            for other in sorted(graph[name]):
                if result := visit(other, [*stack, name]):
                    return result
            done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in sorted(graph))), [])


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def positional(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_there_is_something_to_look_at():
    assert len(FILES) > 80 and {"nft.trainer", "launch.nft", "stitchvm_reward.families"} <= MODULES.keys()
    assert "nft.learner" in imports(MODULES["nft.trainer"])


@pytest.mark.parametrize("path", [p for p in FILES if "families" not in p.parts], ids=str)
def test_only_a_family_names_a_family(path):
    lines = (ROOT / path).read_text().splitlines()
    named = [f"{path}:{number}: {line}" for number, line in enumerate(lines, 1) if FAMILY.search(line)]
    assert not named, "\n".join(named)


def test_no_module_imports_itself_through_others():
    graph = {name: imports(path, inside_functions=False) for name, path in MODULES.items()}
    assert not (found := cycle(graph)), " -> ".join(found)


def test_a_cycle_would_be_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_go_from_the_commands_to_training_to_value_models():
    for name, path in MODULES.items():
        layer = PACKAGES.index(name.partition(".")[0])
        above = {other for other in imports(path) if PACKAGES.index(other.partition(".")[0]) < layer}
        assert not above, f"{name} imports {', '.join(sorted(above))}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_are_short_and_take_few_positional_arguments(path):
    length = len((ROOT / path).read_text().splitlines())
    assert length < LONGEST_FILE, f"{path} has {length} lines"
    for function in functions(path):
        size = (function.end_lineno or 0) - function.lineno + 1
        assert size < LONGEST_FUNCTION, f"{path}: {function.name} has {size} lines"
        names = positional(function)
        assert len(names) <= MOST_POSITIONAL, f"{path}: {function.name}({', '.join(names)})"
