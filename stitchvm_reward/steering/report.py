"""A comparison of ways of steering as a table and as a plot."""

from pathlib import Path
from typing import Any

from stitchvm_reward.errors import InputError
from stitchvm_reward.steering.evaluate import ComparisonRecipe, read

ABOUT = ("family", "label", "seed", "prompts")


def summary(recipe: ComparisonRecipe) -> list[dict[str, Any]]:
    """One row an arm that was measured, in the recipe's order: of every measure the mean over seeds and its standard
    error (NAME_error, None of one seed), and what a picture costs where that was measured.

    Raises InputError where nothing was.
    """
    quality, costs = read(Path(recipe.out).expanduser())
    found = []
    for arm in recipe.arms:
        rows = [row for row in quality if (row["family"], row["label"]) == (arm.family, arm.label)]
        if not rows:
            continue
        row: dict[str, Any] = {"family": arm.family, "label": arm.label, "seeds": len(rows)}
        for name in [name for name in rows[0] if name not in ABOUT]:
            values = [one[name] for one in rows]
            mean = sum(values) / len(values)
            spread = sum((value - mean) ** 2 for value in values)
            row[name] = mean
            row[f"{name}_error"] = (spread / (len(values) - 1) / len(values)) ** 0.5 if len(values) > 1 else None
        own = [cost for cost in costs if (cost["family"], cost["label"]) == (arm.family, arm.label)]
        found.append(row | {k: v for cost in own for k, v in cost.items() if k not in ABOUT})
    if not found:
        raise InputError(f"{recipe.out} holds nothing of this comparison yet; run it without --plot first")
    return found


def names_of(rows: list[dict[str, Any]]) -> list[str]:
    """The measures of a summary's rows."""
    return [key.removesuffix("_error") for key in rows[0] if key.endswith("_error")]


def report(recipe: ComparisonRecipe) -> str:
    """The summary as text."""
    rows = summary(recipe)
    measures, width = names_of(rows), max(len(f"{row['family']} {row['label']}") for row in rows) + 2
    costs = [key for key in ("seconds", "gigaflop", "peak_mib") if any(key in row for row in rows)]
    lines = [f"{'':{width}}" + "".join(f"{name:>18}" for name in measures) + "".join(f"{name:>11}" for name in costs)]
    for row in rows:
        line = f"{row['family'] + ' ' + row['label']:{width}}"
        for name in measures:
            error = row[f"{name}_error"]
            line += f"{row[name]:11.3f}" + (f" ±{error:.3f}" if error is not None else " " * 7)
        lines.append(line + "".join(f"{row[name]:11.3f}" if name in row else f"{'-':>11}" for name in costs))
    return "\n".join(lines)


def draw(recipe: ComparisonRecipe, path: Path) -> None:
    """Every measure over the seconds a picture takes, and the reward over its GFLOP and its peak memory, a curve a
    family, as PNG; where no cost was measured, over the arms."""
    from matplotlib.figure import Figure

    rows = summary(recipe)
    measures, priced = names_of(rows), all("seconds" in row for row in rows)
    panels = [(name, "seconds") for name in measures]
    panels += [("reward", "gigaflop"), ("reward", "peak_mib")] if priced else []
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.2 * across, 3.8 * down), layout="constrained")
    for place, (name, cost) in enumerate(panels):
        axes = figure.add_subplot(down, across, place + 1)
        for number, family in enumerate(dict.fromkeys(row["family"] for row in rows)):
            own = [row for row in rows if row["family"] == family]
            across_x = [row[cost] if priced else rows.index(row) for row in own]
            errors = [row[f"{name}_error"] or 0.0 for row in own]
            axes.errorbar(across_x, [row[name] for row in own], errors, fmt=".-", color=f"C{number}", label=family)
            for x, row in zip(across_x, own):
                axes.annotate(row["label"], (x, row[name]), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.set_xlabel({"seconds": "seconds a picture", "gigaflop": "GFLOP a picture", "peak_mib": "peak MiB"}[cost])
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if place == 0:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
