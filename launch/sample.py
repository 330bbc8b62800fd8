"""Sample seeded pictures, plain or steered:

python launch/sample.py MODEL --prompts TEXT... --grid OUT.png
python launch/sample.py MODEL --prompts TEXT... --grid OUT.png --steer fk --steering RECIPE
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
        prog="launch/sample.py",
        description="Sample one picture per prompt with a diffusers pipeline and draw a labelled grid with one row per "
        "prompt. From the same noise, --lora shows the base beside the tuned model and --steer the plain beside the "
        "steered picture. A picture depends on the seed and on its prompt's place in the list, not on --batch.",
    )
    parser.add_argument("model", help="folder or hub id of a pipeline of a supported family")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE_OR_TEXT", help="prompts and prompt files")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="a LoRA file, as launch/export.py writes it")
    parser.add_argument("--grid", type=Path, required=True, metavar="OUT.png", help="the grid to write")
    parser.add_argument("--across", type=int, default=1, help="prompts per row of the grid; default: 1")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write each picture there, as PNG")
    parser.add_argument("--count", type=int, help="use only the first COUNT prompts")
    parser.add_argument("--steps", type=int, help="solver steps; default: 40, or those of the steering recipe")
    parser.add_argument(
        "--guidance",
        type=float,
        help="guidance scale; default: as in training (1, or a distilled model's own), or the steering recipe's",
    )
    parser.add_argument(
        "--resolution", type=int, help="pixels; default: the LoRA's training resolution, or the model's"
    )
    parser.add_argument("--seed", type=int, help="seed of the noise; default: 0, or the steering recipe's")
    parser.add_argument("--batch", type=int, help="pictures made at once; default: 8 (micro_batch of steering recipes)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: bfloat16 on a GPU, float32 without one")
    steering = parser.add_argument_group("steering")
    steering.add_argument(
        "--steer", metavar="METHOD", help="best_of_n, fk (Feynman-Kac) or dps (guidance by gradients)"
    )
    steering.add_argument("--steering", metavar="RECIPE", help="a recipe such as recipes/steer/shapes.yaml")
    steering.add_argument("--set", nargs="+", default=[], metavar="key=value", help="recipe keys to set")
    steering.add_argument("--trace", type=Path, metavar="OUT.json", help="write the particles' values and ancestors")
    add_trust_option(parser)
    return parser.parse_args(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for arguments that cannot work, before anything is loaded."""
    for name in ("steps", "batch", "count", "across"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.seed is not None and arguments.seed < 0:
        raise InputError(f"--seed must be 0 or more, got {arguments.seed}")
    if arguments.guidance is not None and not 1 <= arguments.guidance < 100:
        raise InputError(f"--guidance must be from 1 (none) to 100, got {arguments.guidance}")
    if arguments.resolution is not None and (arguments.resolution < 16 or arguments.resolution % 16):
        raise InputError(f"--resolution must be a multiple of 16, got {arguments.resolution}")
    if arguments.grid.suffix.lower() != ".png":
        raise InputError(f"--grid must end in .png, got {arguments.grid}")
    check_writable(arguments.grid)


def read_steering(arguments: argparse.Namespace):
    """Return the steering recipe with the command line's settings, or None. Raises InputError where they do not fit."""
    if arguments.steer is None:
        for name in ("steering", "set", "trace"):
            if getattr(arguments, name):
                raise InputError(f"--{name} needs --steer METHOD")
        return None
    if arguments.steering is None:
        raise InputError("--steer needs --steering RECIPE, such as recipes/steer/shapes.yaml")
    if arguments.batch is not None:
        raise InputError(
            f"--batch is for plain sampling, got {arguments.batch}; set micro_batch of the steering recipe"
        )
    from stitchvm_reward.runs.recipe import read_recipe, require_trust
    from stitchvm_reward.steering.build import check_rewards
    from stitchvm_reward.steering.settings import SteeringRecipe

    set_here = {name: getattr(arguments, name) for name in ("steps", "guidance", "seed")}
    given = [f"{name}={value}" for name, value in set_here.items() if value is not None]
    recipe = read_recipe(SteeringRecipe, arguments.steering, [*given, *arguments.set])
    require_trust(recipe.code, arguments.trust_code, arguments.steering)
    recipe.require_method(arguments.steer)
    check_rewards(recipe)
    if arguments.trace is not None:
        check_writable(arguments.trace)
    return recipe


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    recipe = read_steering(arguments)
    import torch

    from nft.evaluation.sample import Sampler, gather_prompts, sample_all, steer_all, write_pictures
    from stitchvm_reward.runs.pictures import picture_grid
    from stitchvm_reward.runs.recipe import DTYPES, one_of

    if arguments.dtype is not None:
        one_of("--dtype", arguments.dtype, DTYPES)
    hide_loading_bars()
    prompts = gather_prompts(arguments.prompts)[: arguments.count]
    device = available_device()
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if recipe is not None:
        from stitchvm_reward.steering.build import check_memory_first

        check_memory_first(
            arguments.model,
            arguments.resolution,
            dtype=dtype,
            device=device,
            method=arguments.steer,
            settings=recipe,
        )
    sampler = Sampler(arguments.model, arguments.lora, dtype, device, arguments.resolution)
    seed, details = arguments.seed or 0, ""
    if recipe is None:
        steps, batch = arguments.steps or 40, arguments.batch or 8
        images = sample_all(sampler, prompts, batch, seed=seed, steps=steps, guidance=arguments.guidance)
    else:
        images, trace = steer_all(sampler, prompts, arguments.steer, recipe)
        seed, details = recipe.seed, f", steered by {arguments.steer}"
        if arguments.trace is not None:
            write_json(arguments.trace, {"prompts": prompts, "trace": trace})
    try:
        picture_grid(images, prompts, arguments.grid, arguments.across)
        if arguments.out is not None:
            write_pictures(images, arguments.out)
    except OSError as error:
        raise InputError(f"cannot write the pictures: {error}") from None
    details += f", {sampler.layers} layers of {arguments.lora} attached" if sampler.tuned else ""
    print(f"wrote {arguments.grid}: {len(prompts)} prompts at {sampler.resolution} px, seed {seed}{details}")


def main() -> int:
    return run_command(lambda: run(parse()))


if __name__ == "__main__":
    sys.exit(main())
