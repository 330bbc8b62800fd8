"""The recipe of a stitched value model."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from stitchvm_reward.rewards.clip import TEXT_KINDS
from stitchvm_reward.runs.recipe import DTYPES, CheckpointRecipe, at_least, one_of, positive, read_recipe, require

REWARDS = ("aesthetic", *TEXT_KINDS)
CONDITIONINGS = ("null", "prompt")


@dataclass
class BackboneRecipe:
    path: str = MISSING
    """Folder or hub id of the Stable Diffusion 3 pipeline whose first blocks are used."""
    dtype: str = "bfloat16"
    """Number format of the frozen blocks."""
    resolution: int = 512
    """Side of the images, in pixels: a value model is for one size."""
    t5_length: int = 256
    """Tokens of T5 text of the empty prompt."""
    block: int | None = None
    """Last block that is run; null: what the search finds best. 0 stitches to the raw latent (the paper's baseline)."""
    conditioning: str = "null"
    """null: the blocks see the empty prompt, whatever the image (the paper). prompt: they see its caption."""

    def __post_init__(self):
        one_of("backbone.dtype", self.dtype, DTYPES)
        whole = self.resolution > 0 and self.resolution % 16 == 0
        require(whole, "backbone.resolution must be a multiple of 16", self.resolution)
        at_least("backbone.t5_length", self.t5_length, 1)
        require(self.block is None or self.block >= 0, "backbone.block must be 0 or more, or null", self.block)
        one_of("backbone.conditioning", self.conditioning, CONDITIONINGS)


@dataclass
class RewardModelRecipe:
    kind: str = "aesthetic"
    """aesthetic (CLIP image tower and head), or clip, dfn_clip, hpsv2, pickscore: image against text."""
    model: str = MISSING
    """Folder or hub id of the CLIP model."""
    head: str = ""
    """File, folder or hub id of the aesthetic head (aesthetic)."""
    block: int | None = None
    """First block that is kept; null: what the search finds best."""

    def __post_init__(self):
        one_of("reward.kind", self.kind, REWARDS)
        require(self.block is None or self.block >= 1, "reward.block must be 1 or more, or null", self.block)


@dataclass
class DataRecipe:
    images: str = MISSING
    """Folder of images (searched with its subfolders), or a hub data set owner/name. No labels are read."""
    split: str = "train"
    """Split of a hub data set."""
    column: str = "image"
    """Column of a hub data set that holds the image."""
    captions: str = "text"
    """Column of a hub data set that holds the caption; a folder keeps it in NAME.txt beside NAME.png. Only read
    where backbone.conditioning is prompt."""
    limit: int = 0
    """Use only so many images; 0: all."""
    held_out: int = 500
    """Images kept out of all fitting, for the curves."""
    cache: str = "~/.cache/stitch-nft/targets"
    """Folder that keeps clean latents and reward targets between runs."""

    def __post_init__(self):
        at_least("data.limit", self.limit, 0)
        at_least("data.held_out", self.held_out, 2)


@dataclass
class SearchRecipe:
    probe: int = 200
    """Images that every pair of blocks is fitted on."""
    held_out: int = 50
    """Images that the fit is judged on beside them."""
    last_reward_block: int = 4
    """Reward blocks j = 1.. up to this one are tried."""

    def __post_init__(self):
        at_least("search.probe", self.probe, 2)
        at_least("search.held_out", self.held_out, 1)
        at_least("search.last_reward_block", self.last_reward_block, 1)


@dataclass
class FinetuneRecipe:
    epochs: int = 5
    """Passes over the images."""
    batch: int = 128
    """Images per optimizer step, over all processes."""
    micro_batch: int = 16
    """Images a device works on at once."""
    learning_rate: float = 1.0e-5
    """AdamW's peak rate for the reward's blocks."""
    layer_factor: float = 5.0
    """The stitching layer learns so many times faster."""
    warmup: int = 100
    """Optimizer steps of linear warm-up."""
    schedule: str = "constant"
    """constant or cosine, after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    token_weight: float = 1.0
    """Weight of the loss on tokens beside the one on the embedding."""
    sigma_mean: float = 0.0
    """Noise levels are drawn as sigmoid(mean + std n), n standard normal: dense in the middle."""
    sigma_std: float = 1.0
    """See sigma_mean."""
    mixed_precision: str = "no"
    """no or bf16: format of the trained blocks' arithmetic; their weights stay float32."""

    def __post_init__(self):
        at_least("finetune.epochs", self.epochs, 1)
        at_least("finetune.batch", self.batch, 1)
        at_least("finetune.micro_batch", self.micro_batch, 1)
        positive("finetune.learning_rate", self.learning_rate)
        positive("finetune.layer_factor", self.layer_factor)
        at_least("finetune.warmup", self.warmup, 0)
        one_of("finetune.schedule", self.schedule, ("constant", "cosine"))
        at_least("finetune.weight_decay", self.weight_decay, 0)
        positive("finetune.max_gradient_norm", self.max_gradient_norm)
        at_least("finetune.token_weight", self.token_weight, 0)
        require(math.isfinite(self.sigma_mean), "finetune.sigma_mean must be finite", self.sigma_mean)
        positive("finetune.sigma_std", self.sigma_std)
        one_of("finetune.mixed_precision", self.mixed_precision, ("no", "bf16"))


@dataclass
class CurvesRecipe:
    every: int = 1
    """Epochs between measurements on the held-out images."""
    sigmas: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5, 0.75, 0.9])
    """Noise levels that are measured."""

    def __post_init__(self):
        at_least("evaluation.every", self.every, 1)
        require(bool(self.sigmas), "evaluation.sigmas must name at least one level", self.sigmas)
        for sigma in self.sigmas:
            require(0 < sigma < 1, "evaluation.sigmas must lie between 0 and 1", sigma)


@dataclass
class StitchRecipe:
    """One value model. A recipe file sets any of these; `base:` names a parent file, relative to it, read first."""

    out: str = MISSING
    """Run folder; the value model is written to its subfolder value_model."""
    seed: int = 0
    """Addresses all randomness, together with epoch and image index."""
    backbone: BackboneRecipe = field(default_factory=BackboneRecipe)
    reward: RewardModelRecipe = field(default_factory=RewardModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    search: SearchRecipe = field(default_factory=SearchRecipe)
    finetune: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    evaluation: CurvesRecipe = field(default_factory=CurvesRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)

    def __post_init__(self):
        at_least("seed", self.seed, 0)


def load_stitch_recipe(path: str | Path, overrides: list[str] | None = None) -> StitchRecipe:
    """Read a stitching recipe; see `read_recipe`."""
    recipe = read_recipe(StitchRecipe, path, overrides)
    needs_head = recipe.reward.kind == "aesthetic"
    require(
        bool(recipe.reward.head) == needs_head,
        "reward.head must name a file, folder or hub id for kind aesthetic, and nothing for another kind",
        recipe.reward.head,
    )
    return recipe
