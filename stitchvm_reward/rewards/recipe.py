"""What a recipe says about one reward."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stitchvm_reward.errors import InputError
from stitchvm_reward.files import check_name
from stitchvm_reward.rewards.clip import TEXT_KINDS
from stitchvm_reward.runs.recipe import one_of, require

KINDS = ("aesthetic", *TEXT_KINDS, "function")


@dataclass
class RewardRecipe:
    kind: str = "aesthetic"
    """aesthetic; clip, dfn_clip, hpsv2 or pickscore (an image against its text); value (a stitched value model, for
    rollouts that stop early); or package.module:Class (a reward of your own with options). function is the same as
    package.module:function."""
    weight: float = 1.0
    """Factor in the weighted sum."""
    model: str = ""
    """Folder or hub id of the CLIP model (aesthetic, and kinds that compare with text)."""
    head: str = ""
    """File, folder or hub id of the aesthetic head (aesthetic)."""
    function: str = ""
    """package.module:function taking (images, prompts) (function)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the class (package.module:Class). Its method score takes (images, prompts); `device` is passed if
    its constructor takes it."""
    dtype: str = "float32"
    """Number format of the CLIP model: float32 or bfloat16 (aesthetic, and kinds that compare with text)."""
    value_model: str = ""
    """Folder that launch/stitch.py wrote (value). Images are scored by the reward that it was stitched from."""
    stitch: str = ""
    """Recipe of launch/stitch.py that builds value_model (value). Training builds a missing value model by it first."""

    def __post_init__(self):
        if self.kind not in (*KINDS, "value") and ":" not in self.kind:
            raise InputError(
                f"rewards.kind must be package.module:Class or one of {', '.join((*KINDS, 'value'))}, got {self.kind!r}"
            )
        one_of("rewards.dtype", self.dtype, ("float32", "bfloat16"))
        clip = self.kind in ("aesthetic", *TEXT_KINDS)
        require(clip or self.dtype == "float32", f"a reward of kind {self.kind} has no dtype to choose", self.dtype)
        require(math.isfinite(self.weight), "rewards.weight must be finite", self.weight)
        if self.kind == "value":
            require(bool(self.value_model), "a reward of kind value needs value_model: a folder", self.value_model)
        elif self.kind == "function":
            require(":" in self.function, "a function reward needs function: package.module:function", self.function)
        elif not self.custom:
            require(bool(self.model), f"a reward of kind {self.kind} needs model: a CLIP folder or hub id", self.model)
        if self.kind == "aesthetic":
            require(bool(self.head), "a reward of kind aesthetic needs head: a file, folder or hub id", self.head)
        check_name(f"the name of a reward of kind {self.kind[:80]!r}", self.name)
        require(self.kind == "value" or not self.stitch, "only a reward of kind value has stitch", self.stitch)
        require(
            bool(self.custom) or not self.options,
            "only a reward of kind package.module:Class has options",
            self.options,
        )

    @property
    def custom(self) -> str:
        """package.module:name of a reward of the user's own; empty for every other kind."""
        return self.function if self.kind == "function" else self.kind if ":" in self.kind else ""

    @property
    def name(self) -> str:
        """The reward's name in logs; a value model is named after the run that wrote it."""
        if self.kind == "value":
            folder = Path(self.value_model)
            return folder.parent.name or folder.name if folder.name == "value_model" else folder.name
        return self.custom.rpartition(":")[2] or self.kind
