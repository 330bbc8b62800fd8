"""What a run taught, read from its folder without loading the base model."""

import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from nft.config import Recipe, load_recipe
from nft.policy import Policy
from stitchvm_reward.diffusion.architectures import TRANSFORMERS, configurations
from stitchvm_reward.errors import InputError
from stitchvm_reward.hub import is_hub_id, locate
from stitchvm_reward.runs import checkpoint
from stitchvm_reward.runs.recipe import one_of

WEIGHTS = ("ema", "current")


@dataclass(frozen=True)
class Trained:
    """One adapter of a checkpoint: `matrices` by LAYER.lora_A (rank, in) and LAYER.lora_B (out, rank) in float32,
    `scaling` by layer, for a transformer of configuration `config`; `weights` names the adapter, `date` is when it was
    saved."""

    folder: Path
    recipe: Recipe
    config: dict[str, Any]
    weights: str
    epoch: int
    step: int
    date: datetime
    matrices: dict[str, Tensor]
    scaling: dict[str, float]

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A and alpha / rank * B of a layer in float64: what everything is verified against.

        From the recipe and not from `scaling`, so that a writer which lost the scale is found out.
        """
        scale = self.recipe.lora.alpha / self.recipe.lora.rank
        return self.matrices[f"{layer}.lora_A"].double(), scale * self.matrices[f"{layer}.lora_B"].double()


def base_configuration(model: str) -> dict[str, Any]:
    """The transformer's configuration of a folder or hub id; no weights are read or fetched. Raises InputError."""
    if is_hub_id(model) and model not in TRANSFORMERS:
        model = str(locate(model, ()))
    return configurations(model)[0]


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def read_trained(run: Path, weights: str = "ema", name: str | None = None) -> Trained:
    """Read an adapter, of WEIGHTS, from the checkpoint called `name` of a run folder: by default the newest whole one.

    Raises InputError where the folder is no run's, or the checkpoint is missing, damaged or of another model.
    """
    one_of("--weights", weights, WEIGHTS)
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run} is no run folder, it holds no recipe.yaml; give one that launch/nft.py wrote")
    recipe = load_recipe(run / "recipe.yaml")
    path = checkpoint.choose(run / "checkpoints", name or "auto", _warn)
    if path is None:
        raise InputError(
            f"{run} holds no checkpoint yet: one is written every {recipe.checkpoint.every} epochs (checkpoint.every) "
            "and after the last"
        )
    tensors, state = checkpoint.load(path)
    with torch.device("meta"):
        network = SD3Transformer2DModel.from_config(base_configuration(recipe.model.path))
        policy = Policy(network, recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets, recipe.seed)
    policy.load_state_dict(tensors["adapters"])  # copies nothing on the meta device; names and shapes are compared
    matrices = {key: tensors["adapters"][f"{weights}/{key}"].float() for key in policy.tensors(weights)}
    date = datetime.fromtimestamp((path / checkpoint.MANIFEST).stat().st_mtime, UTC)
    return Trained(
        run, recipe, dict(network.config), weights, state["epoch"], state["step"], date, matrices, policy.scaling()
    )
