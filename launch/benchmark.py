"""Measure the cost of a recipe at its real shapes, with random weights: python launch/benchmark.py RECIPE"""

import argparse
import sys
from pathlib import Path
from typing import Any

# This file runs as a script: the root of the repository must come before this folder.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from stitchvm_reward.command import available_device, run_command  # noqa: E402
from stitchvm_reward.errors import InputError  # noqa: E402
from stitchvm_reward.files import check_writable, write_json  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/benchmark.py",
        description="Time the work of a recipe with random weights of its shapes; nothing is downloaded. "
        "For a training recipe: encoding a prompt, a rollout step, decoding, scoring an image and its latent, a "
        "training level, the optimizer. For a stitching recipe: one stitched score beside one by Tweedie's estimate "
        "(denoise, decode, score); where it leaves the blocks to the search, block 4 and reward block 1 are used. With "
        "--steering, the same recipe's steps of sampling instead: plain, guided by the gradient of either value, and "
        "with a value of either kind on the way.",
    )
    parser.add_argument("recipe", type=Path, help="a training recipe or a stitching recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to override")
    parser.add_argument("--batch", type=int, default=4, help="latents scored at once (stitching recipe)")
    parser.add_argument("--repeats", type=int, default=5, help="calls, of which the median counts")
    parser.add_argument(
        "--steering", action="store_true", help="steps of steering, with the family's guidance and one latent"
    )
    parser.add_argument("--shapes-only", action="store_true", help="only their FLOPs and memory; nothing is computed")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_intermixed_args(arguments)


def score_benchmark(recipe: Any, batch: int, repeats: int, device: Any) -> tuple[dict[str, Any], list[str]]:
    """Measure one stitched score and one by Tweedie's estimate, and return the results and the printed table."""
    from stitchvm_reward.stitching.benchmark import score_costs

    rows = score_costs(recipe, batch, repeats, device)
    stitched, tweedie = rows
    table = [f"{'one score':12}{'ms':>12}{'GFLOP':>12}{'peak MiB':>12}"]
    for row in rows:
        memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        table.append(f"{row['method']:12}{row['milliseconds']:12.2f}{row['gigaflop']:12.2f}{memory:>12}")
    ratios = (tweedie[key] / stitched[key] for key in ("milliseconds", "gigaflop"))
    table.append("stitched is {:.2f}x cheaper in time, {:.2f}x in FLOPs".format(*ratios))
    about = {
        "backbone": recipe.model.path,
        "resolution": recipe.model.resolution,
        "dtype": recipe.model.dtype,
        "reward": recipe.reward.model,
        "batch": batch,
    }
    return about | {"scores": rows}, table


def steering_benchmark(recipe: Any, repeats: int, device: Any, shapes_only: bool) -> tuple[dict[str, Any], list[str]]:
    """Measure one step of sampling, plain and steered by either value; returns as `score_benchmark` does."""
    from stitchvm_reward.families import family_of
    from stitchvm_reward.steering.benchmark import guided_step_costs

    guidance = family_of(recipe.model.path).steering_guidance
    rows = guided_step_costs(recipe, guidance, repeats, device, shapes_only)
    table = [f"{'one step':28}{'ms':>12}{'GFLOP':>12}{'peak MiB':>12}"]
    for row in rows:
        time = "-" if row["milliseconds"] is None else f"{row['milliseconds']:.2f}"
        table.append(f"{row['method']:28}{time:>12}{row['gigaflop']:12.2f}{row['peak_mib']:12.0f}")
    table.append(f"beside {rows[0]['weights_mib']:.0f} MiB of the transformer's weights")
    about = {
        "backbone": recipe.model.path,
        "resolution": recipe.model.resolution,
        "dtype": recipe.model.dtype,
        "reward": recipe.reward.model,
        "guidance": guidance,
    }
    return about | {"steps": rows}, table


def training_benchmark(recipe: Any, repeats: int, device: Any) -> tuple[dict[str, Any], list[str]]:
    """Measure every phase of a training recipe; returns as `score_benchmark` does."""
    from nft.cost.benchmark import lines, measure

    result = measure(recipe, repeats, device)
    about = {"backbone": recipe.model.path, "resolution": recipe.model.resolution, "dtype": recipe.model.dtype}
    return about | result, lines(result)


def is_stitching(path: Path) -> bool:
    """Return whether a recipe builds a value model, by its keys. Raises InputError unless it does or is for training.

    Recipes of steering have `rewards` without a model, and comparisons `reward` with prompts.
    """
    from stitchvm_reward.runs.recipe import recipe_keys

    keys = recipe_keys(path)
    stitching, training = "reward" in keys and "prompts" not in keys, {"rewards", "model"} <= keys
    if stitching == training:
        raise InputError(
            f"{path} must be a training recipe (with model and rewards) or a stitching recipe (with reward, without "
            "prompts)"
        )
    return stitching


def run(arguments: argparse.Namespace) -> None:
    for name in ("batch", "repeats"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.out is not None:
        check_writable(arguments.out)
    from nft.config import load_recipe
    from stitchvm_reward.stitching.config import load_stitch_recipe

    stitching = is_stitching(arguments.recipe)
    load: Any = load_stitch_recipe if stitching else load_recipe
    recipe = load(arguments.recipe, arguments.overrides)
    from stitchvm_reward.measure import machine

    device = available_device()
    if arguments.steering and not stitching:
        raise InputError(f"--steering needs a stitching recipe, got {arguments.recipe}")
    if arguments.shapes_only and not arguments.steering:
        raise InputError("--shapes-only needs --steering")
    if arguments.steering:
        result, table = steering_benchmark(recipe, arguments.repeats, device, arguments.shapes_only)
    elif stitching:
        result, table = score_benchmark(recipe, arguments.batch, arguments.repeats, device)
    else:
        result, table = training_benchmark(recipe, arguments.repeats, device)
    result = machine(device) | {"recipe": str(arguments.recipe), "overrides": arguments.overrides} | result
    print("  ".join(f"{name} {value}" for name, value in result.items() if not isinstance(value, list | float)))
    print("\n".join(table))
    if arguments.out is not None:
        write_json(arguments.out, result)


def main() -> int:
    return run_command(lambda: run(parse()))


if __name__ == "__main__":
    sys.exit(main())
