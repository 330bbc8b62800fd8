"""Training objectives, one module each: settings, what rollouts keep, the loss and its cost."""

from dataclasses import dataclass, fields

from nft.objectives.awm import AWM, AWMSettings
from nft.objectives.draft import Draft, DraftSettings
from nft.objectives.flow_grpo import FlowGRPO, FlowGRPOSettings
from nft.objectives.nft import NFT, NFTSettings
from nft.objectives.objective import Objective
from nft.rollout import RolloutRecipe
from stitchvm_reward.errors import InputError, nearest
from stitchvm_reward.runs.recipe import require

OBJECTIVES = ("nft", "draft", "awm", "flow_grpo")


@dataclass
class AllSettings(NFTSettings, AWMSettings, FlowGRPOSettings, DraftSettings):
    """The settings of every objective, side by side."""

    objective: str = "nft"
    """nft (DiffusionNFT: rewards are compared), awm (advantage-weighted matching), flow_grpo (Flow-GRPO: stochastic
    steps and their likelihood) or draft (DRaFT: rewards are back-propagated through the solver)."""


def objective_class(name: str) -> type[Objective]:
    """Return an objective by its name in recipes. Raises InputError for an unknown name."""
    if name == "nft":
        return NFT
    if name == "awm":
        return AWM
    if name == "flow_grpo":
        return FlowGRPO
    if name == "draft":
        return Draft
    raise InputError(
        f"train.objective must be one of {', '.join(OBJECTIVES)}, got {name!r}: {nearest(name, [*OBJECTIVES])}"
    )


def check_objective(train: AllSettings, rollout: RolloutRecipe) -> None:
    """Refuse what the objective cannot do, and settings that it does not read. Raises InputError."""
    chosen = objective_class(train.objective)
    read = {setting.name for setting in fields(chosen.settings)} | {"objective", "old_schedule"}
    for setting in fields(AllSettings):
        value = getattr(train, setting.name)
        require(
            setting.name in read or value == setting.default,
            f"train.{setting.name} is not read where train.objective is {train.objective}: leave it at "
            f"{setting.default}",
            value,
        )
    chosen.check(train, rollout)
