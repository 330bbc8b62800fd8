"""What a recipe says about the model."""

from dataclasses import dataclass

import torch
from omegaconf import MISSING

from stitchvm_reward.runs.recipe import DTYPES, at_least, one_of, require


@dataclass
class ModelRecipe:
    path: str = MISSING
    """Folder or hub id of a pipeline: Stable Diffusion 3 or 3.5, or FLUX.1."""
    dtype: str = "bfloat16"
    """Number format of the frozen transformer and the text encoders."""
    resolution: int = 512
    """Side of the images, in pixels."""
    text_length: int = 256
    """Text tokens that the network reads, in training and evaluation alike. FLUX.1 is usually run with 512."""
    guidance: float | None = None
    """Guidance scale that a guidance-distilled model such as FLUX.1-dev is given, in rollouts and in training alike;
    null: the family's own (3.5 for FLUX.1-dev). Other models have no such input."""
    deterministic: bool | None = None
    """Compute with deterministic kernels only, so that a rerun or a resumed run on the same kind of GPU and the same
    versions gives the same bits. An operation that has none ends the run with its name. On a CPU runs repeat without
    it. Slower on a GPU, by an amount that has not been measured. null: on for --check and --record, off otherwise."""
    tf32: bool = True
    """On a GPU, round the inputs of float32 products and convolutions to TF32 (10 bits of mantissa). It concerns what
    does not run in bfloat16, such as rewards and the autoencoder."""

    def __post_init__(self):
        one_of("model.dtype", self.dtype, DTYPES)
        whole = self.resolution > 0 and self.resolution % 16 == 0
        require(whole, "model.resolution must be a multiple of 16", self.resolution)
        at_least("model.text_length", self.text_length, 1)
        require(
            self.guidance is None or 0 <= self.guidance < 100,
            "model.guidance must be from 0 to 100, or null",
            self.guidance,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format as torch has it."""
        return getattr(torch, self.dtype)
