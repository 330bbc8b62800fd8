"""What a run has trained, read from its folder without loading the base model."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nft.config import Recipe, load_recipe
from nft.policy import Policy
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import architecture_of
from stitchvm_reward.families.family import Family
from stitchvm_reward.runs import checkpoint
from stitchvm_reward.runs.recipe import one_of

WEIGHTS = ("ema", "current")


@dataclass(frozen=True)
class Trained:
    """One adapter of a checkpoint.

    `matrices` are LAYER.lora_A (rank, in) and LAYER.lora_B (out, rank) in float32, `scaling` is by layer, `config` the
    configuration of the transformer. `weights` names the adapter, `date` is when it was saved.
    """

    folder: Path
    recipe: Recipe
    family: Family
    config: Mapping[str, Any]
    weights: str
    epoch: int
    step: int
    date: datetime
    matrices: dict[str, Tensor]
    scaling: dict[str, float]

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return A and alpha / rank * B of a layer in float64: what every export is verified against.

        The scale comes from the recipe and not from `scaling`, so that a writer which lost the scale is detected.
        """
        scale = self.recipe.lora.alpha / self.recipe.lora.rank
        return self.matrices[f"{layer}.lora_A"].double(), scale * self.matrices[f"{layer}.lora_B"].double()

    @property
    def published(self) -> str | None:
        """The hub id of the published model of this shape, or None."""
        return self.family.published_as(self.config)

    @property
    def guidance(self) -> float:
        """The guidance scale that the model was trained with; 1 is none."""
        if not self.family.embeds_guidance(self.config):
            return 1.0
        chosen = self.recipe.model.guidance
        return float(self.family.guidance or 1.0) if chosen is None else chosen


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def read_trained(run: Path, weights: str = "ema", name: str | None = None) -> Trained:
    """Read an adapter, one of WEIGHTS, from a checkpoint of a run folder; by default the newest whole one.

    Raises InputError where the folder is not a run's, or the checkpoint is missing, damaged or of another model.
    """
    one_of("--weights", weights, WEIGHTS)
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run} is not a run folder, it has no recipe.yaml; give a folder that launch/nft.py wrote")
    recipe = load_recipe(run / "recipe.yaml")
    path = checkpoint.choose(run / "checkpoints", name or "auto", _warn)
    if path is None:
        raise InputError(
            f"{run} has no checkpoint yet: one is written every {recipe.checkpoint.every} epochs (checkpoint.every) "
            "and after the last epoch"
        )
    tensors, state = checkpoint.load(path)
    architecture, lora = architecture_of(recipe.model.path), recipe.lora
    family = architecture.family
    with torch.device("meta"):
        network = family.transformer.from_config(architecture.transformer)
        policy = Policy(network, lora.rank, lora.alpha, lora.targets or list(family.lora_targets), recipe.seed)
    policy.load_state_dict(tensors["adapters"])  # copies nothing on the meta device; names and shapes are compared
    matrices = {key: tensors["adapters"][f"{weights}/{key}"].float() for key in policy.tensors(weights)}
    return Trained(
        run,
        recipe,
        family,
        dict(network.config),
        weights,
        epoch=state["epoch"],
        step=state["learner"]["step"],
        date=datetime.fromtimestamp((path / checkpoint.MANIFEST).stat().st_mtime, UTC),
        matrices=matrices,
        scaling=policy.scaling(),
    )
