"""What one score costs at real shapes: python launch/benchmark.py recipes/stitch/sd35m_clip.yaml"""

import argparse
import json
import sys
from pathlib import Path

# This file is called as a script of the repository: its root must come before this folder.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from stitchvm_reward.command import answer  # noqa: E402
from stitchvm_reward.errors import InputError  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/benchmark.py",
        description="Time one score by a stitched value model and one by Tweedie's estimate (denoise, decode, judge) "
        "in one run, with random weights of the recipe's shapes: nothing is downloaded. Where the recipe leaves the "
        "blocks to the search, backbone block 4 and reward block 1 are taken.",
    )
    parser.add_argument("recipe", type=Path, help="a recipe of recipes/stitch")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to override")
    parser.add_argument("--batch", type=int, default=4, help="latents scored at once")
    parser.add_argument("--repeats", type=int, default=5, help="calls; their median counts")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    for name in ("batch", "repeats"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    from stitchvm_reward.stitching.config import load_stitch_recipe

    recipe = load_stitch_recipe(arguments.recipe, arguments.overrides)
    import torch

    from stitchvm_reward.stitching.benchmark import machine, score_costs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = score_costs(recipe, arguments.batch, arguments.repeats, device)
    stitched, tweedie = rows
    about = machine(device) | {
        "backbone": recipe.backbone.path,
        "resolution": recipe.backbone.resolution,
        "dtype": recipe.backbone.dtype,
        "reward": recipe.reward.model,
        "batch": arguments.batch,
    }
    print("  ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'one score':12}{'ms':>12}{'GFLOP':>12}{'peak MiB':>12}")
    for row in rows:
        memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        print(f"{row['method']:12}{row['milliseconds']:12.2f}{row['gigaflop']:12.2f}{memory:>12}")
    ratios = (tweedie[key] / stitched[key] for key in ("milliseconds", "gigaflop"))
    print("stitched is {:.2f}x cheaper in time, {:.2f}x in FLOPs".format(*ratios))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(about | {"scores": rows}, indent=1) + "\n")


def main() -> int:
    return answer(lambda: run(parse()))


if __name__ == "__main__":
    sys.exit(main())
