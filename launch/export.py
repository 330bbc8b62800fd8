"""Export a run's adapters: python launch/export.py RUN"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

# This file is called as a script of the repository: its root must come before this folder.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from stitchvm_reward.command import hide_loading_bars, run_command  # noqa: E402
from stitchvm_reward.errors import InputError  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/export.py",
        description="Write a run's adapters as a LoRA file that ComfyUI and diffusers both load, for PEFT, or merged "
        "into a whole transformer, with a model card. What was written is read back and compared with what was trained "
        "before it gets its name.",
    )
    parser.add_argument("run", type=Path, help="a run folder, as launch/nft.py writes it")
    parser.add_argument("--format", default="comfyui", help="comfyui (default; diffusers reads it too), peft or merged")
    parser.add_argument("--weights", default="ema", help="ema (default): the averaged ones, or current")
    parser.add_argument(
        "--dtype", help="float32 (default), bfloat16 or float16; merged, by default what the recipe holds the base in"
    )
    parser.add_argument("--checkpoint", metavar="NAME", help="such as epoch-000010; default: the newest whole one")
    parser.add_argument("--out", type=Path, help="folder to write; default: RUN/export/FORMAT")
    parser.add_argument("--replace", action="store_true", help="write an earlier export of that name anew")
    parser.add_argument("--title", help="for the header and the card")
    parser.add_argument("--license", help="likewise; default: the base model's, where it is a published one")
    parser.add_argument("--author", help="likewise")
    parser.add_argument("--push", metavar="USER/NAME", help="upload it to this repository of the hub, made private")
    parser.add_argument("--public", action="store_true", help="make that repository public")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    if arguments.public and not arguments.push:
        raise InputError("--public is about the repository that --push makes; give --push USER/NAME with it")
    from nft.export.card import FORMATS, Texts, check_login, push
    from nft.export.files import check_destination, export
    from nft.export.trained import read_trained
    from stitchvm_reward.runs.recipe import DTYPES, one_of

    one_of("--format", arguments.format, FORMATS)
    if arguments.dtype is not None:
        one_of("--dtype", arguments.dtype, DTYPES)
    hide_loading_bars()
    out = arguments.out or arguments.run / "export" / arguments.format
    if arguments.push:
        check_login(arguments.push)
    check_destination(out, arguments.replace)
    trained = read_trained(arguments.run, arguments.weights, arguments.checkpoint)
    texts = Texts(arguments.title, arguments.license, arguments.author)
    if arguments.push:
        texts = replace(texts, address=arguments.push)
    layers, deviation = export(trained, arguments.format, arguments.dtype, out, texts, replace=arguments.replace)
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    print(f"wrote {out}: {files}")
    print(
        f"epoch {trained.epoch}, {trained.weights} weights; read back and verified: {layers} layers, their deltas off "
        f"by {deviation:.1e} of their size"
    )
    if arguments.push:
        print(f"uploaded to {push(out, arguments.push, arguments.public)}")


def main() -> int:
    return run_command(lambda: run(parse()))


if __name__ == "__main__":
    sys.exit(main())
