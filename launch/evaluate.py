"""Measure value models: python launch/evaluate.py value FOLDER... --images FOLDER"""

import argparse
import sys
from pathlib import Path

# This file is called as a script of the repository: its root must come before this folder.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from stitchvm_reward.command import answer, hide_loading_bars  # noqa: E402
from stitchvm_reward.errors import InputError  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Measure value models.")
    commands = parser.add_subparsers(dest="command", required=True)
    value = commands.add_parser(
        "value",
        description="The quality of value models of one reward at several noise levels, beside the reward on clean "
        "images, Tweedie's estimate and a Monte Carlo estimate, and what one score costs. Models whose run folders "
        "differ only in a trailing -seedN are reported together. The paper's baseline, the same tail on the raw "
        "latent, is one more model: stitch it with backbone.block=0.",
    )
    value.add_argument("folders", type=Path, nargs="+", help="value models, as launch/stitch.py writes them")
    value.add_argument("--images", required=True, help="folder of images (with NAME.txt captions) or a hub data set")
    value.add_argument("--count", type=int, default=200, help="images")
    value.add_argument("--sigmas", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75, 0.9], help="noise levels")
    value.add_argument("--truth", metavar="MODULE:FUNCTION", help="a true score of (images, captions)")
    value.add_argument("--rollouts", type=int, default=4, help="of the Monte Carlo estimate; 0 leaves it out")
    value.add_argument("--truth-latents", type=int, default=8, help="latents whose error is measured; 0: none")
    value.add_argument("--truth-rollouts", type=int, default=64, help="rollouts that stand for the truth there")
    value.add_argument("--micro-batch", type=int, default=32, help="latents scored at once")
    value.add_argument("--seed", type=int, default=0, help="of the noise")
    value.add_argument("--out", type=Path, help="JSON file to write, with a plot beside it as PNG")
    return parser.parse_args(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before anything is loaded."""
    for name in ("count", "micro_batch"):
        if getattr(arguments, name) < 2:
            raise InputError(f"--{name.replace('_', '-')} must be at least 2, got {getattr(arguments, name)}")
    for sigma in arguments.sigmas:
        if not 0 < sigma < 1:
            raise InputError(f"--sigmas must lie between 0 and 1, got {sigma}")
    for name in ("rollouts", "truth_latents", "truth_rollouts", "seed"):
        if getattr(arguments, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(arguments, name)}")


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    import torch

    from stitchvm_reward.stitching.evaluate import (
        Evaluation,
        Question,
        cost,
        draw,
        quality,
        report,
        save,
        truth_error,
    )

    hide_loading_bars()
    question = Question(
        arguments.images,
        arguments.count,
        sorted(arguments.sigmas),
        arguments.micro_batch,
        arguments.rollouts,
        truth_latents=arguments.truth_latents,
        truth_rollouts=arguments.truth_rollouts,
        seed=arguments.seed,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluation = Evaluation(arguments.folders, arguments.truth, question, device)
    table = quality(evaluation)
    errors = truth_error(evaluation) if arguments.truth_latents else []
    costs = cost(evaluation)
    print(report(table, errors, costs))
    if arguments.out is not None:
        save(arguments.out, quality=table, errors=errors, costs=costs, device=str(device), torch=torch.__version__)
        draw(table, arguments.out.with_suffix(".png"))


def main() -> int:
    return answer(lambda: run(parse()))


if __name__ == "__main__":
    sys.exit(main())
