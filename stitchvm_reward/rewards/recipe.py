"""What a recipe says of one reward."""

import math
from dataclasses import dataclass
from pathlib import Path

from stitchvm_reward.rewards import KINDS
from stitchvm_reward.runs.recipe import one_of, require


@dataclass
class RewardRecipe:
    kind: str = "aesthetic"
    """aesthetic; clip, dfn_clip, hpsv2, pickscore (image against text); function; or value: a stitched value model,
    for rollouts that stop early."""
    weight: float = 1.0
    """Factor in the weighted sum."""
    model: str = ""
    """Folder or hub id of the CLIP model (aesthetic and all that compare with text)."""
    head: str = ""
    """File, folder or hub id of the aesthetic head (aesthetic)."""
    function: str = ""
    """package.module:function taking (images, prompts) (function)."""
    value_model: str = ""
    """Folder that launch/stitch.py wrote (value). Images are judged by the reward that it was stitched from."""

    def __post_init__(self):
        one_of("rewards.kind", self.kind, (*KINDS, "value"))
        require(math.isfinite(self.weight), "rewards.weight must be finite", self.weight)
        if self.kind == "value":
            require(bool(self.value_model), "a reward of kind value needs value_model: a folder", self.value_model)
        elif self.kind == "function":
            require(":" in self.function, "a function reward needs function: package.module:function", self.function)
        else:
            require(bool(self.model), f"a reward of kind {self.kind} needs model: a CLIP folder or hub id", self.model)
        if self.kind == "aesthetic":
            require(bool(self.head), "a reward of kind aesthetic needs head: a file, folder or hub id", self.head)

    @property
    def name(self) -> str:
        """What the reward is called in logs; a value model goes by the run that made it."""
        if self.kind == "value":
            folder = Path(self.value_model)
            return folder.parent.name if folder.name == "value_model" else folder.name
        return self.function.rpartition(":")[2] if self.kind == "function" else self.kind
