"""Settings that make a recipe of the bundled miniature take seconds, for tests and for the commands beside them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recipes/shapes/aesthetic.yaml"
TINY = (
    "rollout.groups=2",
    "rollout.group_size=4",
    "rollout.micro_batch=4",
    "rollout.steps=3",
    "lora.rank=4",
    "lora.alpha=8",  # a scale of 2: a file or a policy that loses it is off by half
    "train.levels_per_sample=1",
    "train.beta_kl=1e-4",  # with a reference and an old policy of its own: every branch runs
    "train.old_schedule=1",
    "evaluation.every=0",
    "evaluation.samples=4",
    "evaluation.grid=4",
    "evaluation.steps=2",
    "checkpoint.every=1",
)
# Groups that stop at different steps, and audits that a few samples pass.
EARLY = (
    "rollout.stop_window=[1,2]",
    "audit.every=1",
    "audit.samples=8",
    "audit.least_spearman=-1",
    "audit.most_slope=1e6",
    "audit.most_bias=1e6",
)
# What makes a run one on rollouts that stop early.
STOPPED = ("rewards=[{kind: value, value_model: miniature/weights/value/aesthetic}]", *EARLY)
# What makes a run one that back-propagates its rewards.
DRAFT = ("train.objective=draft", "train.old_schedule=0", "train.weight_decay=0", "train.beta_kl=.01")
# What makes a run one of advantage-weighted matching, and one of Flow-GRPO.
AWM = ("train.objective=awm",)
FLOW_GRPO = ("train.objective=flow_grpo", "train.old_schedule=0", "train.sde_steps=1", "train.sde_within=2")


def few_prompts(folder: Path) -> tuple[str, ...]:
    """Overrides to twelve training prompts, written into a folder, and to caches there."""
    lines = (ROOT / "miniature/prompts/train.txt").read_text().splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n".join(lines[:12]) + "\n")
    caches = f"prompts.cache={folder}/cache", f"evaluation.cache={folder}/evaluations"
    return f"prompts.train={folder}/train.txt", *caches
