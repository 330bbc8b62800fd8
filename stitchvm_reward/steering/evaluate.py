"""Ways of steering beside each other: what they reach, and what a picture costs."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor
from tqdm import tqdm

from stitchvm_reward.diffusion.generator import Generator, PromptEmbeddings
from stitchvm_reward.errors import nearest
from stitchvm_reward.files import write_json
from stitchvm_reward.rewards import FunctionReward, check_finite, find_function
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.runs.recipe import DTYPES, at_least, one_of, read_recipe, require
from stitchvm_reward.steering.build import check_generator_memory, check_rewards, load_value, pixel_reward
from stitchvm_reward.steering.denoiser import Denoiser
from stitchvm_reward.steering.sampling import make_denoiser, progress_bar, steer_prompts
from stitchvm_reward.steering.settings import METHODS, SteeringRecipe
from stitchvm_reward.steering.values import Value
from stitchvm_reward.stitching.benchmark import machine, peak_mib, timed


@dataclass
class ArmRecipe:
    family: str = MISSING
    """Arms of one family are one curve."""
    label: str = MISSING
    """What tells it from the others of its family."""
    method: str = MISSING
    """best_of_n, fk or dps."""
    recipe: str = MISSING
    """A steering recipe."""
    changes: list[str] = field(default_factory=list)
    """Keys of it to set, key=value."""

    @property
    def name(self) -> str:
        return f"{self.family} {self.label}"


@dataclass
class ComparisonRecipe:
    """Arms on one generator and one list of prompts, from the same noise."""

    out: str = MISSING
    """Folder: a file for each arm and seed, and costs.json."""
    model: str = MISSING
    """Folder or hub id of the generator."""
    dtype: str = "bfloat16"
    """Number format of its transformer."""
    resolution: int = 512
    """Side of the pictures, in pixels."""
    t5_length: int = 256
    """Tokens of T5 text."""
    cache: str = "~/.cache/stitch-nft/prompts"
    """Folder that keeps prompt embeddings."""
    prompts: str = MISSING
    """Prompt file."""
    count: int = 200
    """Its first so many prompts."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One picture a prompt and seed."""
    cost_prompts: int = 8
    """Prompts over which costs are measured."""
    reward: RewardRecipe = MISSING
    """What pictures are judged by: what all arms steer by, in pixels."""
    measures: list[str] = field(default_factory=list)
    """More measures, each a package.module:function taking (images, prompts)."""
    arms: list[ArmRecipe] = field(default_factory=list)

    def __post_init__(self):
        one_of("dtype", self.dtype, DTYPES)
        at_least("count", self.count, 2)
        at_least("cost_prompts", self.cost_prompts, 1)
        require(bool(self.seeds) and min(self.seeds) >= 0, "seeds must be numbers from 0 on", self.seeds)
        names = [arm.name for arm in self.arms]
        require(bool(names) and len(set(names)) == len(names), "arms need names of their own", names)
        for arm in self.arms:
            require(arm.method in METHODS, f"an arm's method: {nearest(arm.method, list(METHODS))}", arm.method)


def settings_of(arm: ArmRecipe) -> SteeringRecipe:
    """The arm's steering recipe, checked. Raises InputError."""
    found = read_recipe(SteeringRecipe, arm.recipe, list(arm.changes))
    found.require_method(arm.method)
    check_rewards(found)
    return found


class Comparison:
    """A comparison's generator, prompts and judges, loaded once; `prompts` are the recipe's, read."""

    def __init__(self, recipe: ComparisonRecipe, prompts: list[str], device: torch.device):
        """Load everything. Raises InputError, for what an arm's recipe says before anything is loaded."""
        self.recipe, self.prompts, self.device = recipe, prompts[: recipe.count], device
        require(len(self.prompts) == recipe.count, f"count must be at most {recipe.prompts}'s", recipe.count)
        self.settings = {arm.name: settings_of(arm) for arm in recipe.arms}
        for name in recipe.measures:
            find_function(name)
        dtype = getattr(torch, recipe.dtype)
        self.embeddings = PromptEmbeddings(recipe.model, recipe.cache, recipe.t5_length, dtype, device)
        self.embeddings.ensure([*self.prompts, ""], progress=lambda items: tqdm(items, desc="encode prompts"))
        self.generator = Generator.load(recipe.model, dtype, device, recipe.resolution)
        self.reward = pixel_reward(recipe.reward, device)
        self.values: dict[str, Value] = {}  # by what arms say of their rewards, each loaded once
        self.measures = {name.rpartition(":")[2]: FunctionReward(name) for name in recipe.measures}

    def denoiser(self, arm: ArmRecipe, seed: int, count: int) -> tuple[Denoiser, Value]:
        """The arm's denoiser of the first `count` prompts, and its value."""
        settings, prompts = replace(self.settings[arm.name], seed=seed), self.prompts[:count]
        rewards = repr((settings.rewards, settings.estimate, settings.rollouts))
        if rewards not in self.values:
            self.values[rewards] = load_value(settings, self.generator)
        value = self.values[rewards]
        conditions, negative = self.embeddings.conditions(prompts), self.embeddings.conditions([""])
        check_generator_memory(self.generator, arm.method, settings, conditions.tokens.shape[1])
        return make_denoiser(self.generator, prompts, conditions, negative, value, settings), value

    @torch.no_grad()
    def quality(self, arm: ArmRecipe, seed: int) -> dict[str, Any]:
        """Means over the prompts of the reward and of every measure on one picture each. Raises InputError."""
        denoiser, value = self.denoiser(arm, seed, len(self.prompts))
        settings = self.settings[arm.name]
        with progress_bar(len(self.prompts), arm.method, settings) as bar:
            bar.set_description(f"{arm.name}, seed {seed}")
            steered = steer_prompts(denoiser, arm.method, value, settings, bar)
        images = torch.cat([self.generator.decode(one.best) for one in steered])
        scores = {"reward": self.reward.score(images, self.prompts)}
        check_finite("reward", scores["reward"])
        scores |= {name: measure.score(images, self.prompts) for name, measure in self.measures.items()}
        found = {name: float(values.double().mean()) for name, values in scores.items()}
        return {"family": arm.family, "label": arm.label, "seed": seed, "prompts": len(images)} | found

    def cost(self, arm: ArmRecipe, repeats: int = 3) -> dict[str, Any]:
        """Seconds (the median) and GFLOP a picture, and the peak MiB beside the weights, of `cost_prompts` prompts."""
        count, settings = self.recipe.cost_prompts, self.settings[arm.name]
        denoiser, value = self.denoiser(arm, 0, count)

        def call() -> Tensor:
            with tqdm(disable=True) as bar:
                steered = steer_prompts(denoiser, arm.method, value, settings, bar)
            with torch.no_grad():
                return torch.cat([self.generator.decode(one.best) for one in steered])

        found = timed(call, count, self.device, repeats)
        milliseconds, gigaflop = found["milliseconds"], found["gigaflop"]
        assert milliseconds is not None
        return {
            "family": arm.family,
            "label": arm.label,
            "seconds": milliseconds / 1e3,
            "gigaflop": gigaflop,
            "peak_mib": peak_mib(call, self.device),
        }


def run(comparison: Comparison, cost: bool) -> None:
    """Measure every arm and seed that has no file yet, or the costs of all arms, in this one run."""
    recipe, about = comparison.recipe, machine(comparison.device)
    folder = Path(recipe.out).expanduser()
    if cost:
        rows = [comparison.cost(arm) for arm in tqdm(recipe.arms, desc="costs", leave=False)]
        write_json(folder / "costs.json", about | {"rows": rows})
        return
    for seed in recipe.seeds:
        for arm in recipe.arms:
            path = folder / f"{arm.name}-seed{seed}.json".replace(" ", "-")
            if not path.exists():
                write_json(path, about | {"arm": arm.__dict__, "row": comparison.quality(arm, seed)})


def read(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of quality and of cost that lie in a comparison's folder."""
    quality = [json.loads(path.read_text())["row"] for path in sorted(folder.glob("*-seed*.json"))]
    costs = folder / "costs.json"
    return quality, json.loads(costs.read_text())["rows"] if costs.is_file() else []
