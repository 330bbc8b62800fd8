"""A recipe: every setting of a run as a typed dataclass, read from YAML with `base:` and key=value overrides."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nft.audit import AuditRecipe
from nft.objectives import AllSettings, check_objective
from nft.optimization import OptimizationSettings
from nft.policy import LoraRecipe
from nft.rollout import RolloutRecipe, require_size
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.files import check_name, check_path
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.runs.recipe import CheckpointRecipe, at_least, one_of, positive, read_recipe, require
from stitchvm_reward.runs.tracking import TRACKERS


@dataclass
class PolicyModelRecipe(ModelRecipe):
    vae_dtype: str = "float32"
    """float32 or bfloat16, of the autoencoder; float16 overflows in it."""
    vae_slicing: bool = False
    """Decode one image at a time: the decoder's memory no longer grows with rollout.micro_batch."""
    compile: bool | None = None
    """Compile the transformer's blocks and the value models' networks with torch.compile: minutes at the start, shorter
    steps from then on. null: on a GPU where Triton, a C compiler and Python.h are found, without ZeRO-3 and without
    model.deterministic; the plan says which, and why. The metric train/recompilations counts the graphs that rollouts
    and updates compile after a process's first epoch, which should be none."""

    def __post_init__(self):
        super().__post_init__()
        require(
            self.dtype != "float16",
            "model.dtype must be bfloat16 or float32: gradients are too small for float16, most of them become zero",
            self.dtype,
        )
        one_of("model.vae_dtype", self.vae_dtype, ("float32", "bfloat16"))


@dataclass
class PromptsRecipe:
    train: str = MISSING
    """Training prompts: a .txt, .json, .jsonl, .csv or .parquet file, or the name of a data set on the hub."""
    held_out: str = MISSING
    """Evaluation prompts, in the same forms."""
    column: str = "text"
    """Column of the prompts, where the file has columns."""
    split: str = "train"
    """Split of a data set on the hub that `train` is read from."""
    held_out_split: str = "test"
    """Split of a data set on the hub that `held_out` is read from."""
    cache: str = "~/.cache/stitch-nft/prompts"
    """Folder that keeps prompt embeddings between runs. Only prompts that the run's epochs draw are encoded."""
    cache_limit: float = 40.0
    """GB (10^9 bytes) that this folder may hold: files that no run has used for longest make room. A run whose prompts
    do not fit encodes them in rounds between its epochs, beside the model, which takes more memory."""

    def __post_init__(self):
        require(bool(self.column), "prompts.column must name a column", self.column)
        positive("prompts.cache_limit", self.cache_limit)


@dataclass
class TrainRecipe(OptimizationSettings, AllSettings):
    def __post_init__(self):
        self.check_optimization()
        if self.micro_batch is not None:
            require_size("train.micro_batch", self.micro_batch)
        self.check()


@dataclass
class EvaluationRecipe:
    every: int = 10
    """Epochs between evaluations. The untrained and the final policy are always evaluated; 0: only these two."""
    samples: int = 128
    """Held-out prompts, one image each, always from the same noise."""
    steps: int = 40
    """Euler steps."""
    micro_batch: Any = None
    """Images that a device samples at once, or auto, as rollout.micro_batch, which is the default."""
    grid: int = 16
    """Images in the before/after grid."""
    metrics: list[str] = field(default_factory=list)
    """Further measures that are never trained on, each a package.module:function of (images, prompts)."""
    cache: str = "~/.cache/stitch-nft/evaluations"
    """Folder that keeps the untrained model's latents between runs, at most 2 GB of them. They are used again where
    everything that decides their bits is the same: weights, prompts, noise, steps, code, versions, device. Empty: none
    are kept."""

    def __post_init__(self):
        at_least("evaluation.every", self.every, 0)
        at_least("evaluation.samples", self.samples, 2)
        at_least("evaluation.steps", self.steps, 1)
        if self.micro_batch is not None:
            require_size("evaluation.micro_batch", self.micro_batch)
        require(1 <= self.grid <= self.samples, "evaluation.grid must be from 1 to evaluation.samples", self.grid)
        for name in self.metrics:
            require(":" in name, "evaluation.metrics must be written package.module:function", name)


@dataclass
class Recipe:
    """One run. A recipe file sets any of these; `base:` names a parent file, relative to it, that is read first."""

    out: str = MISSING
    """Run folder."""
    seed: int = 0
    """Addresses all randomness, together with epoch and sample index."""
    epochs: int = 100
    """Rounds of rollout and update."""
    timeout: int = 1800
    """Seconds without progress after which a run ends with an error that names the phase: another process may be gone
    while this one waits for it. Set it longer than the longest single step, such as loading the model."""
    tracking: list[str] = field(default_factory=lambda: ["jsonl", "tensorboard"])
    """Where metrics go: jsonl (metrics.jsonl, always written), tensorboard, and wandb or trackio where installed."""
    model: PolicyModelRecipe = field(default_factory=PolicyModelRecipe)
    prompts: PromptsRecipe = field(default_factory=PromptsRecipe)
    rewards: list[RewardRecipe] = field(default_factory=list)
    rollout: RolloutRecipe = field(default_factory=RolloutRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    audit: AuditRecipe = field(default_factory=AuditRecipe)

    @property
    def code(self) -> list[str]:
        """Functions and classes that the recipe runs, as package.module:name."""
        return [reward.custom for reward in self.rewards if reward.custom] + self.evaluation.metrics

    def __post_init__(self):
        check_path("out", self.out)
        at_least("seed", self.seed, 0)
        at_least("epochs", self.epochs, 1)
        at_least("timeout", self.timeout, 1)
        for name in self.tracking:
            one_of("tracking", name, TRACKERS)
        require("jsonl" in self.tracking, "tracking must include jsonl: resuming reads it", self.tracking)
        require(bool(self.rewards), "rewards must list at least one reward", self.rewards)
        names = ["total", *(reward.name for reward in self.rewards)]
        metrics = [metric.rpartition(":")[2] for metric in self.evaluation.metrics]
        for metric in metrics:
            check_name("the name of a metric in evaluation.metrics", metric)
        names += metrics
        require(
            len(set(names)) == len(names), "every reward and metric needs a name of its own beside total", names[1:]
        )
        window, stopped = self.rollout.stop_window, {reward.kind == "value" for reward in self.rewards}
        require(
            stopped == {bool(window)},
            "rollout.stop_window and rewards of kind value need each other, and no reward of another kind beside them",
            f"stop_window {window} with {', '.join(reward.kind for reward in self.rewards)}",
        )
        require(
            bool(window) or self.audit.every == 0,
            "audit.every must be 0 where rollouts are full: there is no value model to audit",
            self.audit.every,
        )
        check_objective(self.train, self.rollout)
        samples = self.rollout.groups * self.rollout.group_size
        require(
            self.train.updates_per_epoch <= samples,
            f"train.updates_per_epoch must be at most the epoch's samples ({samples})",
            self.train.updates_per_epoch,
        )


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides; all checks have run on what is returned.

    Raises InputError for unknown keys (with the nearest known one), wrong types and values out of range.
    """
    return read_recipe(Recipe, path, overrides)
