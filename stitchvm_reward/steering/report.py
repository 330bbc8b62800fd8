"""A comparison of steering methods as a table and as a plot."""

from pathlib import Path
from typing import Any

from stitchvm_reward.errors import InputError
from stitchvm_reward.steering.evaluate import ComparisonRecipe, read

IDENTITY = ("family", "label", "seed", "prompts")


def summary(recipe: ComparisonRecipe) -> list[dict[str, Any]]:
    """Return one row per measured arm, in the recipe's order.

    A row holds the mean of every measure over seeds, its standard error (NAME_error, None for one seed), and the cost
    per picture where it was measured. Raises InputError if no arm was measured.
    """
    quality, costs = read(Path(recipe.out).expanduser())
    summaries = []
    for arm in recipe.arms:
        rows = [row for row in quality if (row["family"], row["label"]) == (arm.family, arm.label)]
        if not rows:
            continue
        row: dict[str, Any] = {"family": arm.family, "label": arm.label, "seeds": len(rows)}
        for name in [name for name in rows[0] if name not in IDENTITY]:
            values = [seed_row[name] for seed_row in rows]
            mean = sum(values) / len(values)
            spread = sum((value - mean) ** 2 for value in values)
            row[name] = mean
            row[f"{name}_error"] = (spread / (len(values) - 1) / len(values)) ** 0.5 if len(values) > 1 else None
        arm_costs = [cost for cost in costs if (cost["family"], cost["label"]) == (arm.family, arm.label)]
        summaries.append(row | {k: v for cost in arm_costs for k, v in cost.items() if k not in IDENTITY})
    if not summaries:
        raise InputError(f"{recipe.out} has no results of this comparison yet; run it without --plot first")
    return summaries


def names_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the names of the measures of a summary's rows; `founders` is one of the rows of fk alone."""
    return list(dict.fromkeys(key.removesuffix("_error") for row in rows for key in row if key.endswith("_error")))


def report(recipe: ComparisonRecipe) -> str:
    """Return the summary as text."""
    rows = summary(recipe)
    measures, width = names_of(rows), max(len(f"{row['family']} {row['label']}") for row in rows) + 2
    costs = [key for key in ("seconds", "gigaflop", "peak_mib") if any(key in row for row in rows)]
    lines = [f"{'':{width}}" + "".join(f"{name:>18}" for name in measures) + "".join(f"{name:>11}" for name in costs)]
    for row in rows:
        line = f"{row['family'] + ' ' + row['label']:{width}}"
        for name in measures:
            error = row.get(f"{name}_error")
            line += f"{row[name]:11.3f}" if name in row else f"{'-':>11}"
            line += f" ±{error:.3f}" if error is not None else " " * 7
        lines.append(line + "".join(f"{row[name]:11.3f}" if name in row else f"{'-':>11}" for name in costs))
    return "\n".join(lines)


def draw(recipe: ComparisonRecipe, path: Path) -> None:
    """Draw every measure over the seconds per picture, and the reward over GFLOP and peak memory, as a PNG file.

    Each family is one curve. Where no costs were measured, the measures are drawn over the arms.
    """
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
            members = [row for row in rows if row["family"] == family and name in row]
            positions = [row[cost] if priced else rows.index(row) for row in members]
            errors = [row[f"{name}_error"] or 0.0 for row in members]
            axes.errorbar(positions, [row[name] for row in members], errors, fmt=".-", color=f"C{number}", label=family)
            for x, row in zip(positions, members):
                axes.annotate(row["label"], (x, row[name]), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.set_xlabel(
            {"seconds": "seconds per picture", "gigaflop": "GFLOP per picture", "peak_mib": "peak MiB"}[cost]
        )
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if place == 0:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
