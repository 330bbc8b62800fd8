"""Reference curves: the metrics of a recipe's first epochs, and a comparison of a rerun with them."""

import importlib.metadata
import json
import math
import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import torch

from nft.config import Recipe
from nft.preflight import check_recipe
from nft.trainer import Trainer
from stitchvm_reward.errors import InputError
from stitchvm_reward.files import write_json
from stitchvm_reward.runs.launcher import make_accelerator
from stitchvm_reward.runs.numerics import set_numerics
from stitchvm_reward.runs.tracking import read_metrics

CLOSE_SHARE = 0.02  # of the reference value
CLOSE_LEAST = 0.01
VERDICTS = ("equal", "close", "different")
DIGITS = 6  # significant digits that references keep
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def reference_path(recipe_path: Path) -> Path:
    """Return the path of a recipe file's reference."""
    return recipe_path.parent / "reference" / f"{recipe_path.stem}.json"


def comparable(row: dict[str, float]) -> dict[str, float]:
    """Return a row of metrics without those that depend on the machine's speed."""
    return {name: value for name, value in row.items() if not name.startswith(("seconds/", "images_per"))}


def _commit() -> str:
    result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip() or "unknown"


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _verdict(expected: float, result: float | None) -> str:
    if result is None or not math.isfinite(result):
        return "different"
    if _rounded(result) == _rounded(expected):
        return "equal"
    return "close" if abs(result - expected) <= max(CLOSE_LEAST, CLOSE_SHARE * abs(expected)) else "different"


def compare(expected: list[dict[str, float]], rerun: list[dict[str, float]]) -> list[tuple[str, str, str]]:
    """Return for each metric its name, the worst verdict over the epochs, and where and by how much it differs most."""
    by_epoch = {row["epoch"]: row for row in rerun}
    results = []
    for name in dict.fromkeys(name for row in expected for name in row if name not in ("epoch", "step")):
        rows = [(row["epoch"], row[name], by_epoch.get(row["epoch"], {}).get(name)) for row in expected if name in row]
        verdict = max((_verdict(value, other) for _, value, other in rows), key=VERDICTS.index)
        epoch, value, other = max(rows, key=lambda row: abs((row[2] if row[2] is not None else math.inf) - row[1]))
        detail = "" if verdict == "equal" else f"epoch {epoch}: {value:.6g} expected, {other} found"
        results.append((name, verdict, detail))
    return results


def _rerun(recipe: Recipe, folder: Path, epochs: int) -> list[dict[str, float]]:
    short = replace(
        recipe,
        out=str(folder / "run"),
        epochs=epochs,
        evaluation=replace(recipe.evaluation, every=1),
        checkpoint=replace(recipe.checkpoint, every=epochs, resume="never"),
        model=replace(recipe.model, deterministic=recipe.model.deterministic in (None, True)),
    )
    check_recipe(short)
    set_numerics(bool(short.model.deterministic), short.model.tf32)
    accelerator = make_accelerator()
    Trainer(short, accelerator).train()
    return [comparable(row) for row in read_metrics(folder / "run")]


def run(recipe: Recipe, recipe_path: Path, folder: Path, record: int | None) -> int:
    """Write the reference of `record` epochs, or compare with it. Returns 1 if a metric is different, otherwise 0."""
    path = reference_path(recipe_path)
    if record is not None:
        rows = _rerun(recipe, folder, record)
        if odd := sorted({name for row in rows for name, value in row.items() if not math.isfinite(value)}):
            raise InputError(f"{', '.join(odd)} must be finite to be a reference, and is not: no reference is written")
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        about = {
            "commit": _commit(),
            "versions": versions,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        write_json(path, about | {"rows": rows})
        print(f"wrote {path}")
        return 0
    if not path.is_file():
        raise InputError(f"{recipe_path} has no reference curve ({path}); record one with --record EPOCHS")
    reference = json.loads(path.read_text())
    results = compare(reference["rows"], _rerun(recipe, folder, reference["rows"][-1]["epoch"]))
    width = max(len(name) for name, *_ in results)
    for name, verdict, detail in results:
        print(f"{name:{width}}  {verdict:9}  {detail}")
    worst = max((verdict for _, verdict, _ in results), key=VERDICTS.index)
    print(f"{worst}: reference of commit {reference['commit'][:10]}, {reference['versions']}")
    return int(worst == "different")
