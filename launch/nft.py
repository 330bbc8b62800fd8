"""Train a policy: accelerate launch launch/nft.py RECIPE [key=value ...]"""

import argparse
import sys
import tempfile
from pathlib import Path

# This file has the name of the package that it starts: the root of the repository must come before this folder.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from stitchvm_reward.command import add_trust_option, hide_loading_bars, run_command  # noqa: E402
from stitchvm_reward.errors import InputError  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/nft.py",
        description="Fine-tune an image diffusion model by reinforcement, as a recipe says.",
        epilog="Example: accelerate launch launch/nft.py recipes/shapes/aesthetic.yaml epochs=20 out=runs/try",
    )
    parser.add_argument("recipe", help="a recipe file, such as recipes/shapes/aesthetic.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to set, such as epochs=20")
    parser.add_argument("--dry-run", action="store_true", help="print the plan without loading weights, and stop")
    parser.add_argument("--processes", type=int, help="number of processes to plan for (with --dry-run)")
    parser.add_argument("--check", action="store_true", help="rerun the first epochs and compare with the reference")
    parser.add_argument("--record", type=int, metavar="EPOCHS", help="write that reference from this many epochs")
    add_trust_option(parser)
    return parser.parse_intermixed_args(arguments)


def run(arguments: argparse.Namespace) -> int:
    for name in ("record", "processes"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    from nft.config import load_recipe
    from stitchvm_reward.runs.recipe import require_trust

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    require_trust(recipe.code, arguments.trust_code, arguments.recipe)
    if arguments.dry_run:
        from nft.cost.micro_batch import print_plan
        from nft.value_models import build_plan

        for line in build_plan(recipe):
            print(line)
        print_plan(recipe, arguments.processes or 1)
        return 0
    if arguments.processes is not None:
        raise InputError("--processes only plans, with --dry-run; the launcher sets the number of processes")
    if arguments.check or arguments.record is not None:
        from nft import reference

        with tempfile.TemporaryDirectory() as folder:
            return reference.run(recipe, Path(arguments.recipe), Path(folder), arguments.record)
    train(recipe)
    return 0


def train(recipe) -> None:
    from nft.preflight import check_recipe

    hide_loading_bars()
    check_recipe(recipe)
    from nft.trainer import Trainer
    from stitchvm_reward.runs.launcher import make_accelerator, shutdown
    from stitchvm_reward.runs.numerics import set_numerics
    from stitchvm_reward.runs.rank_sync import RankSync, Stopped, mark_stopped, watchdog

    set_numerics(bool(recipe.model.deterministic), recipe.model.tf32)
    accelerator = make_accelerator(recipe.timeout)
    ranks = RankSync(accelerator)
    ranks.listen()
    try:
        with watchdog(ranks.timings, recipe.timeout, accelerator.process_index):
            finished = Trainer(recipe, accelerator, ranks).train()
    except Stopped as stopped:
        finished = False
        if accelerator.is_main_process:
            message = str(stopped) or "stopped by a signal before the first epoch"
            mark_stopped(message)
            print(f"{message}; what was encoded or built is kept, run again to continue")
    if finished and accelerator.is_main_process:
        print(f"done: {recipe.out}/before_after.png, curves.png, lora.safetensors, metrics.jsonl")
    shutdown(accelerator)


def main() -> int:
    return run_command(lambda: run(parse()))


if __name__ == "__main__":
    sys.exit(main())
