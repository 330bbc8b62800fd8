"""The recipe of a stitched value model."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.files import check_path
from stitchvm_reward.rewards.clip import TEXT_KINDS
from stitchvm_reward.runs.recipe import CheckpointRecipe, at_least, one_of, positive, read_recipe, require
from stitchvm_reward.runs.tracking import check_trackers

REWARDS = ("aesthetic", *TEXT_KINDS)
CONDITIONINGS = ("null", "prompt")


@dataclass
class BackboneRecipe:
    block: int | None = None
    """Last block of the model that is run; null: the block that the search finds best. 0 stitches to the raw latent
    (the paper's baseline)."""
    conditioning: str = "null"
    """null: the blocks read the empty prompt for every image (the paper). prompt: they read the image's caption."""

    def __post_init__(self):
        require(self.block is None or self.block >= 0, "backbone.block must be 0 or more, or null", self.block)
        one_of("backbone.conditioning", self.conditioning, CONDITIONINGS)


@dataclass
class RewardModelRecipe:
    kind: str = "aesthetic"
    """aesthetic (a CLIP image tower and a head), or one that compares an image with its text: clip, dfn_clip, hpsv2,
    pickscore."""
    model: str = MISSING
    """Folder or hub id of the CLIP model."""
    head: str = ""
    """File, folder or hub id of the aesthetic head (kind aesthetic)."""
    block: int | None = None
    """First block of the reward model that is kept; null: the block that the search finds best."""

    def __post_init__(self):
        one_of("reward.kind", self.kind, REWARDS)
        require(self.block is None or self.block >= 1, "reward.block must be 1 or more, or null", self.block)


@dataclass
class GenerateRecipe:
    images: int = 0
    """Number of images that the model draws; 0: none, they are those of data.images. They are kept as clean latents in
    data.cache and drawn once for all rewards; a larger number later adds to them."""
    prompts: str = ""
    """Prompts, each used once before any is used again: a .txt, .json, .jsonl, .csv or .parquet file, or a data set on
    the hub. The training prompts are the natural choice."""
    column: str = "text"
    """Column of the prompts, where the file has columns."""
    split: str = "train"
    """Split of a data set on the hub."""
    guidance: list[float] = field(default_factory=list)
    """Guidance scales, each for an equal share of the images: of classifier-free guidance, where 1 is without, or those
    that a guidance-distilled model is given. Empty: what the model's family is published with, or model.guidance."""
    steps: int = 28
    """Euler steps."""
    micro_batch: int = 8
    """Images that a device draws at once."""

    def __post_init__(self):
        at_least("data.generate.images", self.images, 0)
        at_least("data.generate.steps", self.steps, 1)
        at_least("data.generate.micro_batch", self.micro_batch, 1)
        for scale in self.guidance:
            require(1 <= scale < 100, "data.generate.guidance must lie from 1 to 100", scale)
        require(
            not self.images or bool(self.prompts), "data.generate needs prompts: a file or a data set", self.prompts
        )


@dataclass
class DataRecipe:
    images: str = ""
    """Folder of images (PNG, JPEG or WebP), searched with its subfolders, or a hub data set owner/name of such images.
    Labels are not read."""
    generate: GenerateRecipe = field(default_factory=GenerateRecipe)
    """Images that the model draws itself, in place of data.images."""
    split: str = "train"
    """Split of a hub data set."""
    column: str = "image"
    """Column of a hub data set that holds the image."""
    captions: str = "text"
    """Column of a hub data set that holds the caption. In a folder, NAME.txt beside NAME.png holds it. Captions are
    read only if backbone.conditioning is prompt."""
    limit: int = 0
    """Number of images of data.images to use, the first ones; 0: all."""
    held_out: int = 500
    """Images that are excluded from all fitting and used for the curves."""
    cache: str = "~/.cache/stitch-nft/targets"
    """Folder that keeps clean latents and reward targets between runs. Processes on several machines must share it."""

    def __post_init__(self):
        at_least("data.limit", self.limit, 0)
        at_least("data.held_out", self.held_out, 2)


@dataclass
class SearchRecipe:
    probe: int = 200
    """Images that every pair of blocks is fitted to."""
    held_out: int = 50
    """Further images, on which the fits are compared."""
    last_reward_block: int = 4
    """The search tries reward blocks j from 1 to this one."""

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
    """Images that a device processes at once."""
    learning_rate: float = 1.0e-5
    """Peak learning rate of AdamW for the reward's blocks."""
    layer_factor: float = 5.0
    """Learning rate of the stitching layer as a multiple of learning_rate."""
    warmup: int = 100
    """Optimizer steps of linear warm-up."""
    schedule: str = "constant"
    """constant or cosine, after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    token_weight: float = 1.0
    """Weight of the loss on tokens relative to the loss on the embedding."""
    sigma_mean: float = 0.0
    """Noise levels are drawn as sigmoid(sigma_mean + sigma_std n) with n standard normal: dense in the middle."""
    sigma_std: float = 1.0
    """See sigma_mean."""
    mixed_precision: str = "no"
    """no or bf16: number format in which the trained blocks compute; their weights stay float32."""

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
    """Noise levels at which the value model is measured."""

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
    timeout: int = 1800
    """Seconds without progress after which the run ends with an error that names the phase. It must exceed the longest
    single step, such as loading the model."""
    tracking: list[str] = field(default_factory=lambda: ["jsonl", "tensorboard"])
    """Where metrics go: jsonl (always), tensorboard, wandb, trackio."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    """The model whose first blocks are the backbone. A value model works at one resolution."""
    backbone: BackboneRecipe = field(default_factory=BackboneRecipe)
    reward: RewardModelRecipe = field(default_factory=RewardModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    search: SearchRecipe = field(default_factory=SearchRecipe)
    finetune: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    evaluation: CurvesRecipe = field(default_factory=CurvesRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)

    def __post_init__(self):
        check_path("out", self.out)
        at_least("seed", self.seed, 0)
        at_least("timeout", self.timeout, 1)


def load_stitch_recipe(path: str | Path, overrides: list[str] | None = None) -> StitchRecipe:
    """Read a stitching recipe; see `read_recipe`."""
    recipe = read_recipe(StitchRecipe, path, overrides)
    needs_head = recipe.reward.kind == "aesthetic"
    require(
        bool(recipe.reward.head) == needs_head,
        "reward.head must name a file, folder or hub id for kind aesthetic, and nothing for another kind",
        recipe.reward.head,
    )
    data = recipe.data
    require(
        bool(data.images) != bool(data.generate.images),
        "the images come either from data.images, a folder or data set, or from the model, which draws "
        "data.generate.images of them: set the one and clear the other (data.generate.images=0, or data.images='')",
        f"{data.images!r} and {data.generate.images}",
    )
    check_trackers(recipe.tracking)
    return recipe
