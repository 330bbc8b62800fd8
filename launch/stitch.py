"""Build a stitched value model: accelerate launch launch/stitch.py RECIPE [key=value ...]"""

import argparse
import sys
from pathlib import Path

# This file runs as a script of the repository: the repository's root must precede this folder.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from stitchvm_reward.command import hide_loading_bars, run_command  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/stitch.py",
        description="Build a value model that scores noisy latents, as described by a recipe.",
        epilog="Example: accelerate launch launch/stitch.py recipes/stitch/shapes_aesthetic.yaml finetune.epochs=2",
    )
    parser.add_argument("recipe", help="a stitching recipe, such as recipes/stitch/shapes_aesthetic.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to set, such as seed=1")
    parser.add_argument(
        "--search", action="store_true", help="stop after the search for the best pair of blocks and draw its heat map"
    )
    return parser.parse_intermixed_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    from stitchvm_reward.stitching.config import load_stitch_recipe

    recipe = load_stitch_recipe(arguments.recipe, arguments.overrides)
    from stitchvm_reward.runs.launcher import make_accelerator, shutdown
    from stitchvm_reward.runs.numerics import set_numerics
    from stitchvm_reward.runs.rank_sync import RankSync, watchdog
    from stitchvm_reward.stitching.build import build

    hide_loading_bars()
    set_numerics(bool(recipe.model.deterministic), recipe.model.tf32)
    accelerator = make_accelerator(recipe.timeout)
    ranks = RankSync(accelerator)
    ranks.listen()
    with watchdog(ranks.timings, recipe.timeout, accelerator.process_index):
        folder = build(recipe, accelerator, arguments.search, ranks)
    if folder is not None and accelerator.is_main_process:
        print(f"done: {folder}")
    shutdown(accelerator)


def main() -> int:
    return run_command(lambda: run(parse()))


if __name__ == "__main__":
    sys.exit(main())
