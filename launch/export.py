"""Export a run's adapters: python launch/export.py RUN"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

# This file runs as a script of the repository: the repository's root must precede this folder.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from stitchvm_reward.command import hide_loading_bars, run_command  # noqa: E402
from stitchvm_reward.errors import InputError  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/export.py",
        description="Write a run's adapters as a LoRA file that both ComfyUI and diffusers load, for PEFT, or merged "
        "into the whole transformer, with a model card. The files are read back and compared with what was trained "
        "before the folder appears.",
    )
    parser.add_argument("run", type=Path, help="a run folder that launch/nft.py wrote")
    parser.add_argument("--format", default="comfyui", help="comfyui (default; diffusers reads it too), peft or merged")
    parser.add_argument("--weights", default="ema", help="ema (default): averaged, or current")
    parser.add_argument(
        "--dtype", help="float32 (default), bfloat16 or float16; the default for merged is the recipe's model.dtype"
    )
    parser.add_argument(
        "--checkpoint", metavar="NAME", help="such as epoch-000010; default: the newest complete checkpoint"
    )
    parser.add_argument("--out", type=Path, help="folder to write; default: RUN/export/FORMAT")
    parser.add_argument("--replace", action="store_true", help="overwrite an earlier export")
    parser.add_argument("--title", help="title in the header and the card")
    parser.add_argument("--license", help="licence in the header and the card; default: that of a published base")
    parser.add_argument("--author", help="author in the header and the card")
    parser.add_argument("--push", metavar="USER/NAME", help="upload to this hub repository; a new one is private")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    if arguments.public and not arguments.push:
        raise InputError("--public applies to the repository that --push creates; add --push USER/NAME")
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
        f"epoch {trained.epoch}, {trained.weights} weights; read back and verified: {layers} layers, deltas off by "
        f"{deviation:.1e} of their size"
    )
    if arguments.push:
        print(f"uploaded to {push(out, arguments.push, arguments.public)}")


def main() -> int:
    return run_command(lambda: run(parse()))


if __name__ == "__main__":
    sys.exit(main())
