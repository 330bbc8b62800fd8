"""Sample seeded pictures: python launch/sample.py MODEL --prompts TEXT... --grid OUT.png"""

import argparse
import sys
from pathlib import Path

# This file is called as a script of the repository: its root must come before this folder.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from stitchvm_reward.command import answer, available_device, hide_loading_bars  # noqa: E402
from stitchvm_reward.errors import InputError  # noqa: E402
from stitchvm_reward.files import check_writable  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/sample.py",
        description="Sample with a Stable Diffusion 3 pipeline, one picture a prompt, and draw a labelled grid: one "
        "row a prompt, with --lora the base beside the tuned model from the same noise. A picture depends on the "
        "seed and on its prompt's place in the list, not on --batch.",
    )
    parser.add_argument("model", help="folder or hub id of a Stable Diffusion 3 pipeline")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE_OR_TEXT", help="prompts and prompt files")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="a LoRA file, as launch/export.py writes it")
    parser.add_argument("--grid", type=Path, required=True, metavar="OUT.png", help="the grid to write")
    parser.add_argument("--across", type=int, default=1, help="prompts that stand in a row of the grid; default: 1")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write each picture there as well, as PNG")
    parser.add_argument("--count", type=int, help="only the first so many prompts")
    parser.add_argument("--steps", type=int, default=40, help="of the solver; default: 40")
    parser.add_argument("--guidance", type=float, default=1.0, help="default: 1, none, as in training")
    parser.add_argument("--resolution", type=int, help="pixels; default: what the LoRA was trained at, or the model's")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--batch", type=int, default=8, help="pictures made at once")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: bfloat16 on a GPU, float32 without one")
    return parser.parse_args(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be sampled, before anything is loaded."""
    for name in ("steps", "batch", "count", "across"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.seed < 0:
        raise InputError(f"--seed must be 0 or more, got {arguments.seed}")
    if not 1 <= arguments.guidance < 100:
        raise InputError(f"--guidance must be from 1 (none) to 100, got {arguments.guidance}")
    if arguments.resolution is not None and (arguments.resolution < 16 or arguments.resolution % 16):
        raise InputError(f"--resolution must be a multiple of 16, got {arguments.resolution}")
    if arguments.grid.suffix.lower() != ".png":
        raise InputError(f"--grid must end in .png, got {arguments.grid}")
    check_writable(arguments.grid)


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    import torch

    from nft.sample_images import Sampler, gather_prompts, sample_all, write_pictures
    from stitchvm_reward.runs.recipe import DTYPES, one_of
    from stitchvm_reward.runs.tracking import picture_grid

    if arguments.dtype is not None:
        one_of("--dtype", arguments.dtype, DTYPES)
    hide_loading_bars()
    prompts = gather_prompts(arguments.prompts)[: arguments.count]
    device = available_device()
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    sampler = Sampler(arguments.model, arguments.lora, dtype, device, arguments.resolution)
    images = sample_all(sampler, prompts, arguments.batch, arguments.seed, arguments.steps, arguments.guidance)
    try:
        arguments.grid.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(images, prompts, arguments.grid, arguments.across)
        if arguments.out is not None:
            write_pictures(images, arguments.out)
    except OSError as error:
        raise InputError(f"cannot write the pictures: {error}") from None
    told = f", {sampler.layers} layers of {arguments.lora} attached" if sampler.tuned else ""
    print(f"wrote {arguments.grid}: {len(prompts)} prompts at {sampler.resolution} px, seed {arguments.seed}{told}")


def main() -> int:
    return answer(lambda: run(parse()))


if __name__ == "__main__":
    sys.exit(main())
