"""One process of a distributed test: worker.py PLAN, a JSON list of runs that are made one after the other.

Each run is {"recipe": ..., "overrides": [...], "out": FOLDER, "fault": null}. Every process leaves what it collects
in the epoch that the run begins or goes on with in FOLDER/epoch-E-rank-N.safetensors; the run itself leaves metrics and
checkpoints there.
A fault is one to look out for: `unreduced` gradients stay on the process that computed them, a restart loses Adam's
`moments`, or the `old` adapter, which begins anew. A run under recipes/stitch builds a value model.
"""

import json
import sys
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file

from nft.config import load_recipe
from nft.trainer import Trainer
from stitchvm_reward.runs.launcher import make_accelerator, shutdown
from stitchvm_reward.stitching.build import build
from stitchvm_reward.stitching.config import load_stitch_recipe


def train(run: dict, accelerator: Accelerator) -> None:
    trainer, fault = Trainer(load_recipe(run["recipe"], run["overrides"]), accelerator), run["fault"]
    if fault == "moments":
        trainer.learner.backend.optimizer.state.clear()
    elif fault == "old":
        for key, matrix in trainer.learner.policy.tensors("old").items():
            if key.endswith("lora_B"):
                matrix.data.zero_()
    collected = {}
    for rollout in trainer.collector.collect(trainer.epoch):
        for place, sample in enumerate(rollout.samples):
            collected[f"anchor.{sample}"] = rollout.anchor[place].clone()
            if rollout.rewards:  # those of draft are found in the update
                collected[f"reward.{sample}"] = rollout.rewards["total"][place].clone()
    save_file(collected, Path(run["out"]) / f"epoch-{trainer.epoch}-rank-{accelerator.process_index}.safetensors")
    if fault == "unreduced":
        trainer.learner.backend.gradients.reduce = lambda: None
    trainer.train()


def main(plan: Path) -> None:
    accelerator = make_accelerator()
    for run in json.loads(plan.read_text()):
        if "stitch" in run["recipe"]:
            build(load_stitch_recipe(run["recipe"], run["overrides"]), accelerator)
        else:
            train(run, accelerator)
        accelerator.free_memory()  # DeepSpeed has one engine at a time
    shutdown(accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
