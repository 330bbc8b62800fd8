"""What a stitched value model is worth: a run on stopped rollouts that are scored in another way.

python -m miniature.ablations RECIPE {tweedie,shuffled,noised} [key=value ...]

`tweedie` scores the image of the clean latent that the policy predicts from the noisy one, as a user without a value
model would: it takes one more forward pass and a decoding for each sample. `shuffled` gives every value to another
sample of its micro batch, and `noised` adds normal noise of the values' own standard deviation: controls that tell how
much of a run's result the values are responsible for. Everything else is the run that the recipe describes; its count
of FLOPs leaves out what `tweedie` adds.
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from nft.collector import Collector
from nft.config import load_recipe
from nft.preflight import check_recipe
from nft.rollout import Rollout
from nft.scoring import Scorer
from nft.trainer import Trainer
from stitchvm_reward.command import add_trust_option, hide_loading_bars, run_command
from stitchvm_reward.diffusion.path import per_sample
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.launcher import make_accelerator, shutdown
from stitchvm_reward.runs.numerics import set_numerics
from stitchvm_reward.runs.recipe import require, require_trust

KINDS = ("tweedie", "shuffled", "noised")
STREAM = 1001  # of random numbers; apart from those of stitchvm_reward.runs.randomness


def tweedie_scores(collector: Collector, scorer: Scorer, rollout: Rollout) -> dict[str, Tensor]:
    """Return the rewards of the image of each sample's predicted clean latent, z - tau v."""
    latents, tau = rollout.anchor, rollout.tau
    velocity = collector.learner.frozen_velocity("old", latents, tau, rollout.conditions)
    images = collector.generator.decode(latents - per_sample(tau, latents) * velocity.float())
    return scorer.score(images, [collector.prompts[prompt] for prompt in rollout.prompts])


def shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return the values (batch,) in another order, in which none is where it was."""
    order = torch.randperm(len(values), generator=generator)
    moved = torch.empty_like(values)
    moved[order] = values[order.roll(1)]
    return moved


def noised(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return the values (batch,) with normal noise of their own standard deviation: half of the variance is noise."""
    noise = torch.randn(len(values), generator=generator).to(values.device)
    return values + values.std(correction=0) * noise


def replace_scores(collector: Collector, scorer: Scorer, kind: str, epoch: Callable[[], int]) -> None:
    """Make a collector score its rollouts as `kind` of KINDS says; `epoch` tells the current one."""
    score = collector.score
    assert score is not None

    def changed(rollout: Rollout) -> dict[str, Tensor]:
        if kind == "tweedie":
            return tweedie_scores(collector, scorer, rollout)
        scores = score(rollout)
        generator = randomness.at(collector.seed, STREAM, epoch(), rollout.samples[0])
        change = shuffled if kind == "shuffled" else noised
        return scores | {"total": change(scores["total"], generator)}

    collector.score = changed


def run(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    require_trust(recipe.code, arguments.trust_code, arguments.recipe)
    window = recipe.rollout.stop_window
    require(bool(window), "rollout.stop_window must be set: an ablation is of rollouts that stop early", window)
    hide_loading_bars()
    check_recipe(recipe)
    set_numerics(bool(recipe.model.deterministic), recipe.model.tf32)
    accelerator = make_accelerator(recipe.timeout)
    trainer = Trainer(recipe, accelerator)
    replace_scores(trainer.collector, trainer.auditor.scorer, arguments.kind, lambda: trainer.epoch)
    trainer.train()
    shutdown(accelerator)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m miniature.ablations", description="Replace the value model.")
    parser.add_argument("recipe", help="a recipe whose rollouts stop early, such as recipes/shapes/stopped.yaml")
    parser.add_argument("kind", choices=KINDS, help="how rollouts are scored instead")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to set, such as epochs=8")
    add_trust_option(parser)
    arguments = parser.parse_intermixed_args()
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
