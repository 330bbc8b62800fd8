"""python -m tests.fake_cuda RECIPE [RECIPE ...] [--out JSON]: exit 0 where nothing was found, 1 otherwise."""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.fake_cuda.device import GIB, preload, pretend


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fake_cuda",
        description="Run one epoch of recipes at their real shapes on a CUDA device that computes nothing.",
        epilog="Example: python -m tests.fake_cuda recipes/aesthetic.yaml recipes/flux/draft.yaml --out fake_cuda.json",
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="a recipe of Stable Diffusion 3.5 or FLUX.1")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write peaks, plan and all faults to this file")
    parser.add_argument(
        "--memory", type=int, default=80, metavar="GIB", help="of the device, where micro batches are auto"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    preload()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ |= {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
        import torch

        from stitchvm_reward.command import hide_loading_bars
        from stitchvm_reward.measure import machine
        from tests.fake_cuda import mode, stand_ins
        from tests.fake_cuda.epoch import HEAD, Machine
        from tests.fake_cuda.watch import Watch

        hide_loading_bars()
        commit = machine(torch.device("cpu"))["commit"]
        watch = Watch()
        pretend(watch.synchronised, arguments.memory * GIB)
        mode.install()
        stand_ins.install()
        fake, results = Machine(stand_ins.Hub(folder / "hub"), watch), []
        problems: list[str] = []
        for number, recipe in enumerate(arguments.recipes):
            place = folder / str(number)
            place.mkdir()
            results.append(fake.run(recipe, place))
            problems = [f"{result.recipe}: {problem}" for result in results for problem in result.problems()]
            if arguments.out:
                content = {"commit": commit, "passed": not problems, "recipes": [asdict(result) for result in results]}
                arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    print("\n".join([HEAD, *(row for result in results for row in result.table()), *problems]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
