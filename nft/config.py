"""A recipe: every setting of a run as a typed dataclass, read from YAML with `base:` and key=value overrides."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from nft.objective import OBJECTIVES, SPACES
from nft.policy import INITS
from stitchvm_reward.diffusion.solvers import SOLVERS
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.runs.recipe import DTYPES, CheckpointRecipe, at_least, one_of, positive, read_recipe, require

# What an objective does not read: another value there is a mistake.
UNREAD = {
    "nft": ("draft_steps",),
    "draft": ("levels", "levels_per_sample", "space", "beta", "per_group_std"),
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass
class ModelRecipe:
    path: str = MISSING
    """Folder or hub id of a Stable Diffusion 3 pipeline."""
    dtype: str = "bfloat16"
    """Number format of the frozen transformer and the text encoders; adapters and losses are float32."""
    resolution: int = 512
    """Side of the images, in pixels."""
    t5_length: int = 256
    """Tokens of T5 text, in training and evaluation alike."""
    vae_dtype: str = "float32"
    """float32 or bfloat16, of the autoencoder; float16 overflows in it."""
    vae_slicing: bool = False
    """Decode one image at a time: the decoder's memory no longer grows with rollout.micro_batch."""
    compile: bool = False
    """torch.compile the transformer's blocks: minutes at the start, shorter steps from then on."""

    def __post_init__(self):
        one_of("model.dtype", self.dtype, DTYPES)
        one_of("model.vae_dtype", self.vae_dtype, ("float32", "bfloat16"))
        require(
            self.resolution > 0 and self.resolution % 16 == 0,
            "model.resolution must be a multiple of 16",
            self.resolution,
        )
        at_least("model.t5_length", self.t5_length, 1)


@dataclass
class PromptsRecipe:
    train: str = MISSING
    """Training prompts: a .txt, .json, .jsonl, .csv or .parquet file, or a hub data set's name."""
    held_out: str = MISSING
    """Evaluation prompts, likewise."""
    column: str = "text"
    """Column that holds the prompt, where the file has columns."""
    split: str = "train"
    """Split of a hub data set that `train` is read from."""
    held_out_split: str = "test"
    """Split of a hub data set that `held_out` is read from."""
    cache: str = "~/.cache/stitch-nft/prompts"
    """Folder that keeps prompt embeddings between runs."""

    def __post_init__(self):
        require(bool(self.column), "prompts.column must name a column", self.column)


@dataclass
class RolloutRecipe:
    groups: int = 48
    """Prompts per epoch."""
    group_size: int = 24
    """Images per prompt."""
    micro_batch: int = 8
    """Samples a device works on at once, in rollout and in training."""
    steps: int = 10
    """Solver steps of a full rollout."""
    solver: str = "euler"
    """euler (neutral: what evaluation uses) or dpm2 (second order; overshoots the data's spread at 10 steps)."""
    stop_window: list[int] = field(default_factory=list)
    """[first, last]: each group's rollouts stop after a number of steps drawn from it, and a value model scores the
    noisy latents there; [12, 17] for 25 steps is the paper's. Empty: full rollouts, decoded and scored as images."""

    def __post_init__(self):
        at_least("rollout.groups", self.groups, 1)
        at_least("rollout.group_size", self.group_size, 1)
        at_least("rollout.micro_batch", self.micro_batch, 1)
        at_least("rollout.steps", self.steps, 2)
        one_of("rollout.solver", self.solver, SOLVERS)
        if self.stop_window:
            ordered = len(self.stop_window) == 2 and 1 <= self.stop_window[0] <= self.stop_window[-1] < self.steps
            require(
                ordered,
                f"rollout.stop_window must be [first, last] with 1 <= first <= last < rollout.steps ({self.steps})",
                self.stop_window,
            )


@dataclass
class LoraRecipe:
    rank: int = 32
    """Rank of the adapters."""
    alpha: int = 64
    """Scale numerator: the update is alpha / rank * B A."""
    targets: list[str] = field(default_factory=lambda: [f"attn.{name}" for name in ATTENTION])
    """Layers to adapt, by the end of their names: `attn2.to_q` and its like add Medium's second attention."""
    init: str = "gaussian"
    """How A begins: gaussian (of deviation 1 / rank, as DiffusionNFT) or kaiming (uniform, as PEFT by default). B
    begins at zero, so that the policy begins as the base model."""
    start: str = ""
    """LoRA file to begin from instead, as launch/export.py writes them or training leaves it: of the same rank, on the
    same layers. The reference of train.beta_kl stays the base model."""

    def __post_init__(self):
        at_least("lora.rank", self.rank, 1)
        at_least("lora.alpha", self.alpha, 1)
        require(bool(self.targets), "lora.targets must name at least one layer", self.targets)
        one_of("lora.init", self.init, INITS)


@dataclass
class TrainRecipe:
    objective: str = "nft"
    """nft (DiffusionNFT) or draft (DRaFT): rewards are compared, or back-propagated through the solver."""
    draft_steps: int = 1
    """The rollout's last solver steps, which draft back-propagates through: K of DRaFT-K."""
    updates_per_epoch: int = 1
    """Optimizer steps per epoch; each uses an equal share of the epoch's samples."""
    levels: str = "grid"
    """Noise levels to train on: grid (the solver's own) or continuous (uniform)."""
    levels_per_sample: int = 1
    """Noise levels per sample and epoch, without repetition on the grid: most of a run's cost."""
    space: str = "anchor"
    """Loss on anchors with self-normalised weights (anchor) or on velocities (velocity)."""
    beta: float = 1.0
    """Strength of the implicit policies v+ and v-."""
    beta_kl: float = 1.0e-4
    """Weight of the mean squared distance to the reference's velocity; 0 skips the reference forward."""
    per_group_std: bool = False
    """Divide advantages by the group's own standard deviation instead of the epoch's."""
    old_schedule: int = 1
    """How the old policy follows: 0 at once, 1 slowly at most half, 2 late and long (DiffusionNFT)."""
    learning_rate: float = 3.0e-4
    """AdamW's peak rate."""
    warmup: int = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 1.0e-4
    """AdamW's decoupled decay."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.9
    """Ceiling of the evaluation average's decay."""
    on_nonfinite: str = "raise"
    """raise or skip: what happens, on all processes alike, where a reward or a gradient is not finite. Nothing of it is
    applied; skip goes on with the next optimizer step."""
    most_skips: int = 3
    """So many steps in a row may be skipped."""
    optimizer: str = "adamw"
    """adamw, or adamw_8bit: its moments in 8 bits, by bitsandbytes (installed as the extra `8bit`)."""
    gradient_checkpointing: bool = False
    """Keep only each block's input for the backward pass and run the block again there: a third more work in training,
    a small part of its memory."""

    def __post_init__(self):
        one_of("train.objective", self.objective, OBJECTIVES)
        at_least("train.draft_steps", self.draft_steps, 1)
        at_least("train.updates_per_epoch", self.updates_per_epoch, 1)
        one_of("train.levels", self.levels, ("grid", "continuous"))
        at_least("train.levels_per_sample", self.levels_per_sample, 1)
        one_of("train.space", self.space, SPACES)
        require(0 < self.beta <= 1, "train.beta must be in (0, 1]", self.beta)
        at_least("train.beta_kl", self.beta_kl, 0)
        require(self.old_schedule in (0, 1, 2), "train.old_schedule must be 0, 1 or 2", self.old_schedule)
        positive("train.learning_rate", self.learning_rate)
        at_least("train.warmup", self.warmup, 0)
        at_least("train.weight_decay", self.weight_decay, 0)
        positive("train.max_gradient_norm", self.max_gradient_norm)
        require(0 <= self.ema_decay < 1, "train.ema_decay must be in [0, 1)", self.ema_decay)
        one_of("train.on_nonfinite", self.on_nonfinite, ("raise", "skip"))
        at_least("train.most_skips", self.most_skips, 1)
        one_of("train.optimizer", self.optimizer, ("adamw", "adamw_8bit"))


@dataclass
class EvaluationRecipe:
    every: int = 10
    """Epochs between evaluations; the untrained and the final policy are always evaluated, 0 means only those."""
    samples: int = 128
    """Held-out prompts used, one image each, always from the same noise."""
    steps: int = 40
    """Euler steps."""
    grid: int = 16
    """Images in the before/after grid."""
    metrics: list[str] = field(default_factory=list)
    """More measures, never trained on, each a package.module:function taking (images, prompts)."""

    def __post_init__(self):
        at_least("evaluation.every", self.every, 0)
        at_least("evaluation.samples", self.samples, 2)
        at_least("evaluation.steps", self.steps, 1)
        require(1 <= self.grid <= self.samples, "evaluation.grid must be from 1 to evaluation.samples", self.grid)
        for name in self.metrics:
            require(":" in name, "evaluation.metrics are written package.module:function", name)


@dataclass
class AuditRecipe:
    every: int = 0
    """Epochs between audits of a value model: some stopped samples are rolled on to the image and scored by the true
    reward. 0: never."""
    samples: int = 32
    """Samples of an audit, over all processes."""
    on_drift: str = "warn"
    """warn or stop, when value and true reward have come apart."""
    least_spearman: float = 0.3
    """They have when their rank correlation, the mean of the last three audits', is below this."""
    most_slope: float = 1.75
    """Or when the true reward changes by more than so many times what the value changes by, or by less than its
    inverse (the slope of their regression over the last three audits; 1 is calibrated)."""
    most_bias: float = 1.5
    """Or when the mean value exceeds the mean true reward by so many of the true reward's standard deviations more
    than in the first three audits."""

    def __post_init__(self):
        at_least("audit.every", self.every, 0)
        at_least("audit.samples", self.samples, 8)
        one_of("audit.on_drift", self.on_drift, ("warn", "stop"))
        require(-1 <= self.least_spearman <= 1, "audit.least_spearman must be in [-1, 1]", self.least_spearman)
        require(self.most_slope > 1, "audit.most_slope must be above 1", self.most_slope)
        positive("audit.most_bias", self.most_bias)


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
    """Seconds without progress after which a run ends with an error that names the phase: a process may be gone and
    the others wait for it. To be longer than the longest single step, such as loading the model."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    prompts: PromptsRecipe = field(default_factory=PromptsRecipe)
    rewards: list[RewardRecipe] = field(default_factory=list)
    rollout: RolloutRecipe = field(default_factory=RolloutRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    audit: AuditRecipe = field(default_factory=AuditRecipe)

    def __post_init__(self):
        at_least("seed", self.seed, 0)
        at_least("epochs", self.epochs, 1)
        at_least("timeout", self.timeout, 1)
        require(bool(self.rewards), "rewards must list at least one reward", self.rewards)
        names = ["total", *(reward.name for reward in self.rewards)]
        names += [metric.rpartition(":")[2] for metric in self.evaluation.metrics]
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
        self._check_objective()
        most = window[0] if window else self.rollout.steps
        require(
            self.train.levels == "continuous" or self.train.levels_per_sample <= most,
            f"train.levels_per_sample must be at most the {most} solver levels that every sample has above its own",
            self.train.levels_per_sample,
        )
        batches = -(-self.rollout.groups * self.rollout.group_size // self.rollout.micro_batch)
        require(
            self.train.updates_per_epoch <= batches,
            f"train.updates_per_epoch must be at most the epoch's micro batches ({batches})",
            self.train.updates_per_epoch,
        )

    def _check_objective(self) -> None:
        """Refuse what the objective cannot do, and settings that it does not read."""
        train, rollout = self.train, self.rollout
        draft = train.objective == "draft"
        require(
            draft or rollout.group_size >= 2,
            "rollout.group_size must be at least 2: a lone sample has no advantage",
            rollout.group_size,
        )
        for name in UNREAD[train.objective]:
            default = getattr(TrainRecipe, name)
            require(
                getattr(train, name) == default,
                f"train.{name} is not read where train.objective is {train.objective}: leave it at {default}",
                getattr(train, name),
            )
        if not draft:
            return
        require(rollout.solver == "euler", "train.objective=draft needs rollout.solver=euler", rollout.solver)
        require(
            train.old_schedule == 0,
            "train.objective=draft needs train.old_schedule=0: it goes on with the current policy's own rollouts",
            train.old_schedule,
        )
        most = rollout.stop_window[0] if rollout.stop_window else rollout.steps
        require(
            train.draft_steps <= most,
            f"train.draft_steps must be at most the {most} solver steps that every rollout has",
            train.draft_steps,
        )


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides; every check has run on what is returned.

    Raises InputError for unknown keys (with the nearest known one), wrong types and values out of range.
    """
    return read_recipe(Recipe, path, overrides)
