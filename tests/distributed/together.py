"""One process of a test of stopping together: together.py PLAN, a JSON list of runs that are made one after the other.

Each run is {"overrides": [...], "out": FOLDER}, with "signal": [process, phase, time] where that process is to be sent
SIGTERM as it enters the phase for that time, or "fault": [process, kind] where something goes wrong on that one only:
encode_raises, reward_raises, reward_nan or gradient_nan. A run leaves in FOLDER.finished-N whether it came to its end.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from nft.config import load_recipe
from nft.objectives.nft import NFT
from nft.trainer import Trainer
from stitchvm_reward.command import run_command
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.runs.launcher import make_accelerator, shutdown
from stitchvm_reward.runs.rank_sync import RankSync, Stopped
from stitchvm_reward.runs.tracking import Timings

PHASE, LOSS = Timings.phase, NFT.loss
RECIPE = "recipes/shapes/aesthetic.yaml"


def send_signal(phase: str, at: int) -> None:
    entered = []

    def interrupted(self, name):
        entered.append(name)
        if name == phase and entered.count(phase) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return PHASE(self, name)

    Timings.phase = interrupted


def go_wrong(kind: str, trainer: Trainer) -> None:
    calls = []

    def fault(function):
        def faulty(*arguments, **named):
            calls.append(function)
            found = function(*arguments, **named)
            if len(calls) < 3:  # in the second epoch, when there is something to lose
                return found
            if kind == "reward_raises":
                raise ValueError("the reward server is gone")
            return {name: values * torch.nan for name, values in found.items()}

        return faulty

    def loss(*arguments, **named):
        calls.append(loss)
        found, parts = LOSS(*arguments, **named)
        return (found if len(calls) < 3 else found * torch.nan), parts

    if kind == "gradient_nan":
        NFT.loss = loss
    else:
        trainer.held_out.scorer.score = fault(trainer.held_out.scorer.score)


def broken(*arguments, **options):
    raise ValueError("the tokenizer is broken")


def train(run: dict, accelerator: Accelerator) -> bool:
    Timings.phase = PHASE
    ranks, rank = RankSync(accelerator), accelerator.process_index
    ranks.listen()
    recipe, fault = load_recipe(RECIPE, run["overrides"]), run.get("fault", [None])
    if fault == [rank, "encode_raises"]:
        PromptCache.ensure = broken
    if run.get("signal", [None])[0] == rank:
        send_signal(*run["signal"][1:])
    try:
        trainer = Trainer(recipe, accelerator, ranks)
    except Stopped:
        return False
    if fault[0] == rank:
        go_wrong(fault[1], trainer)
    return trainer.train()


def main(plan: Path) -> int:
    accelerator = make_accelerator()
    for run in json.loads(plan.read_text()):
        finished = train(run, accelerator)
        accelerator.free_memory()  # DeepSpeed has one engine at a time
        Path(f"{run['out']}.finished-{accelerator.process_index}").write_text(str(finished))
    shutdown(accelerator)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(Path(sys.argv[1]))))
