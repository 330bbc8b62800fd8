"""Measure value models, images of a base and a tuned model, or methods of steering:

python launch/evaluate.py value FOLDER... --images FOLDER
python launch/evaluate.py images RECIPE --lora FILE
python launch/evaluate.py steering COMPARISON
"""

import argparse
import sys
from pathlib import Path

# This file runs as a script: the root of the repository must come before this folder.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from stitchvm_reward.command import add_trust_option, available_device, hide_loading_bars, run_command  # noqa: E402
from stitchvm_reward.errors import InputError  # noqa: E402
from stitchvm_reward.files import check_writable, write_json  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/evaluate.py",
        description="Measure value models, images of a base and a tuned model, or methods of steering.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    value = commands.add_parser(
        "value",
        description="Measure the quality of value models of one reward at several noise levels, compared with the "
        "reward on clean images, Tweedie's estimate and a Monte Carlo estimate, and the cost of one score. Models "
        "whose run folders differ only in a trailing -seedN are reported together. For the paper's baseline, the same "
        "tail on the raw latent, stitch a model with backbone.block=0.",
    )
    value.add_argument("folders", type=Path, nargs="+", help="value models that launch/stitch.py wrote")
    value.add_argument("--images", required=True, help="folder of images (with NAME.txt captions) or a hub data set")
    value.add_argument("--count", type=int, default=200, help="number of images")
    value.add_argument("--sigmas", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75, 0.9], help="noise levels")
    value.add_argument("--truth", metavar="MODULE:FUNCTION", help="true score, a function of (images, captions)")
    value.add_argument("--rollouts", type=int, default=4, help="rollouts per Monte Carlo estimate; 0: none")
    value.add_argument("--truth-latents", type=int, default=8, help="latents whose error is measured; 0: none")
    value.add_argument("--truth-rollouts", type=int, default=64, help="rollouts per latent that define the truth there")
    value.add_argument("--micro-batch", type=int, default=32, help="latents scored at once")
    value.add_argument("--seed", type=int, default=0, help="seed of the noise")
    value.add_argument("--out", type=Path, help="JSON file to write, with a plot beside it as PNG")
    images = commands.add_parser(
        "images",
        description="Measure a recipe's rewards and metrics on images of its held-out prompts, by its model with and "
        "without a LoRA file from the same noise: means, the paired difference with its 95% confidence interval "
        "(bootstrap over prompts), and the shares of prompts that improved and got worse.",
    )
    images.add_argument("recipe", help="a recipe file, such as recipes/shapes/aesthetic.yaml, or a run's recipe.yaml")
    images.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to set")
    images.add_argument("--lora", type=Path, metavar="FILE", help="a LoRA file that launch/export.py wrote")
    images.add_argument("--count", type=int, help="held-out prompts; default: the recipe's evaluation.samples")
    images.add_argument("--seed", type=int, help="seed of the noise; default: the recipe's")
    images.add_argument("--out", type=Path, metavar="FILE.json", help="JSON file to write")
    add_trust_option(images)
    steering = commands.add_parser(
        "steering",
        description="Measure the arms of a comparison: reward and measures on one image per prompt and seed. Each arm "
        "and seed is written to a JSON file in the comparison's folder; existing files are kept, so that a stopped "
        "comparison continues. With --cost, measure the cost of an image by every arm instead. --plot and --pareto "
        "tabulate and draw the results so far: means with 95% bootstrap intervals over prompts and seeds, and paired "
        "differences to one arm.",
    )
    steering.add_argument("recipe", help="a comparison, such as recipes/steer/compare_dps.yaml")
    steering.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to set")
    steering.add_argument("--cost", action="store_true", help="measure seconds, FLOPs and memory instead")
    steering.add_argument("--plot", type=Path, metavar="OUT.png", help="only tabulate and draw existing results")
    steering.add_argument(
        "--pareto", type=Path, metavar="OUT.png", help="the same, with --floor against reward, and reward against GFLOP"
    )
    steering.add_argument("--floor", metavar="MEASURE", help="a measure that should be kept, for --pareto")
    steering.add_argument("--against", metavar="ARM", help="arm that differences are to; default: the first one")
    add_trust_option(steering)
    parsed, rest = parser.parse_known_args(arguments)
    # In a subcommand, argparse does not accept positional arguments that follow an option.
    if rest and (parsed.command == "value" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if parsed.command != "value":
        parsed.overrides += rest
    return parsed


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for arguments that cannot work, before anything is loaded."""
    for name in ("count", "micro_batch"):
        if getattr(arguments, name) < 2:
            raise InputError(f"--{name.replace('_', '-')} must be at least 2, got {getattr(arguments, name)}")
    for sigma in arguments.sigmas:
        if not 0 < sigma < 1:
            raise InputError(f"--sigmas must lie between 0 and 1, got {sigma}")
    for name in ("rollouts", "truth_latents", "truth_rollouts", "seed"):
        if getattr(arguments, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(arguments, name)}")


def run_images(arguments: argparse.Namespace) -> None:
    if arguments.seed is not None and arguments.seed < 0:
        raise InputError(f"--seed must be 0 or more, got {arguments.seed}")
    from nft.config import load_recipe
    from stitchvm_reward.runs.recipe import require_trust

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    require_trust(recipe.code, arguments.trust_code, arguments.recipe)
    from nft.evaluation.measure import evaluate_images, table
    from stitchvm_reward.bootstrap import CONFIDENCE
    from stitchvm_reward.measure import machine
    from stitchvm_reward.runs.numerics import set_numerics

    hide_loading_bars()
    set_numerics(bool(recipe.model.deterministic), recipe.model.tf32)
    device = available_device()
    rows = evaluate_images(recipe, arguments.lora, arguments.count, arguments.seed, device)
    print(table(rows))
    if arguments.out is not None:
        about = {
            "recipe": arguments.recipe,
            "overrides": arguments.overrides,
            "lora": arguments.lora and str(arguments.lora),
            "prompts": arguments.count or recipe.evaluation.samples,
            "seed": recipe.seed if arguments.seed is None else arguments.seed,
            "confidence": CONFIDENCE,
        }
        write_json(arguments.out, machine(device) | about | {"rows": rows})


def run_value(arguments: argparse.Namespace) -> None:
    check(arguments)
    if arguments.out is not None:
        check_writable(arguments.out.with_suffix(".png"))
    from stitchvm_reward.measure import machine
    from stitchvm_reward.stitching.evaluate import (
        Evaluation,
        ValueEvaluationConfig,
        cost,
        draw,
        quality,
        report,
        truth_error,
    )

    hide_loading_bars()
    question = ValueEvaluationConfig(
        arguments.images,
        arguments.count,
        sorted(arguments.sigmas),
        arguments.micro_batch,
        arguments.rollouts,
        truth_latents=arguments.truth_latents,
        truth_rollouts=arguments.truth_rollouts,
        seed=arguments.seed,
    )
    device = available_device()
    evaluation = Evaluation(arguments.folders, arguments.truth, question, device)
    table = quality(evaluation)
    errors = truth_error(evaluation) if arguments.truth_latents else []
    costs = cost(evaluation)
    print(report(table, errors, costs))
    if arguments.out is not None:
        write_json(arguments.out, machine(device) | {"quality": table, "errors": errors, "costs": costs})
        draw(table, arguments.out.with_suffix(".png"))


def run_steering(arguments: argparse.Namespace) -> None:
    drawn = [path for path in (arguments.plot, arguments.pareto) if path is not None]
    if (arguments.pareto is None) != (arguments.floor is None):
        raise InputError("--pareto OUT.png and --floor MEASURE need each other; give both")
    if arguments.against is not None and not drawn:
        raise InputError(f"--against is for the tables of --plot and --pareto, got {arguments.against!r} with neither")
    from stitchvm_reward.runs.numerics import set_numerics
    from stitchvm_reward.runs.recipe import read_recipe, require_trust
    from stitchvm_reward.steering.evaluate import Comparison, ComparisonRecipe, run
    from stitchvm_reward.steering.settings import SteeringRecipe

    recipe = read_recipe(ComparisonRecipe, arguments.recipe, arguments.overrides)
    if drawn:
        from stitchvm_reward.steering.plots import draw, draw_pareto
        from stitchvm_reward.steering.report import report, summary

        for path in drawn:
            check_writable(path)
        arms = summary(recipe, arguments.against)
        if arguments.pareto is not None:
            draw_pareto(arms, arguments.floor, arguments.pareto)
        if arguments.plot is not None:
            draw(arms, arguments.plot)
        print(report(arms, arguments.against))
        return
    require_trust(recipe.code, arguments.trust_code, arguments.recipe)
    for arm in recipe.arms:
        steering = read_recipe(SteeringRecipe, arm.recipe, list(arm.changes))
        require_trust(steering.code, arguments.trust_code, arguments.recipe, arm.recipe)
    set_numerics(bool(recipe.model.deterministic), recipe.model.tf32)
    check_writable(Path(recipe.out).expanduser() / "costs.json")
    from stitchvm_reward.prompts import read_prompts

    hide_loading_bars()
    run(Comparison(recipe, read_prompts(recipe.prompts, "text", "train"), available_device()), arguments.cost)


def run(arguments: argparse.Namespace) -> None:
    if arguments.command == "steering":
        return run_steering(arguments)
    if arguments.out is not None:
        check_writable(arguments.out)
    if arguments.command == "images":
        run_images(arguments)
    else:
        run_value(arguments)


def main() -> int:
    return run_command(lambda: run(parse()))


if __name__ == "__main__":
    sys.exit(main())
