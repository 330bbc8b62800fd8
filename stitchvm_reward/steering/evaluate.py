"""Comparison of steering methods: the rewards that they reach and what a picture costs."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor
from tqdm import tqdm

from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.errors import InputError, nearest
from stitchvm_reward.families import architecture_of
from stitchvm_reward.files import check_name, check_path, write_json
from stitchvm_reward.measure import machine, peak_mib, timed
from stitchvm_reward.rewards import FunctionReward, check_custom, check_finite, find_function
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.runs.recipe import at_least, read_recipe, require
from stitchvm_reward.steering.build import check_rewards, load_value, pixel_reward
from stitchvm_reward.steering.denoiser import Denoiser
from stitchvm_reward.steering.memory import free_memory
from stitchvm_reward.steering.sampling import (
    candidate_bytes,
    make_denoiser,
    progress_bar,
    require_memory,
    steer_prompts,
)
from stitchvm_reward.steering.settings import METHODS, SteeringRecipe
from stitchvm_reward.steering.values import Value


@dataclass
class ArmRecipe:
    family: str = MISSING
    """Arms of one family form one curve."""
    label: str = MISSING
    """Distinguishes the arm from the others of its family."""
    method: str = MISSING
    """best_of_n, fk or dps."""
    recipe: str = MISSING
    """A steering recipe."""
    changes: list[str] = field(default_factory=list)
    """Keys of that recipe to set, key=value."""

    @property
    def name(self) -> str:
        """Family and label."""
        return f"{self.family} {self.label}"

    def file(self, seed: int) -> str:
        """Name of the arm's result of a seed."""
        return f"{self.name}-seed{seed}.json".replace(" ", "-")


@dataclass
class ComparisonRecipe:
    """Arms on one generator and one list of prompts, from the same noise."""

    out: str = MISSING
    """Folder for the results: a file for each arm and seed, and costs.json."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    """The generator. A guidance-distilled generator is given the guidance of the arm's recipe."""
    cache: str = "~/.cache/stitch-nft/prompts"
    """Folder that keeps encoded prompts."""
    prompts: str = MISSING
    """Prompt file."""
    count: int = 200
    """Number of prompts to use, the first ones of the file."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One picture per prompt and seed."""
    cost_prompts: int = 8
    """Prompts over which costs are measured."""
    reward: RewardRecipe = MISSING
    """The reward of pictures that all arms are compared by."""
    measures: list[str] = field(default_factory=list)
    """Further measures, each a package.module:function taking (images, prompts)."""
    arms: list[ArmRecipe] = field(default_factory=list)

    @property
    def code(self) -> list[str]:
        """Functions and classes that the comparison, without its arms, runs, as package.module:name."""
        return [*self.measures, *([self.reward.custom] if self.reward.custom else [])]

    def __post_init__(self):
        at_least("count", self.count, 2)
        at_least("cost_prompts", self.cost_prompts, 1)
        require(bool(self.seeds) and min(self.seeds) >= 0, "seeds must be numbers from 0 on", self.seeds)
        require(max(self.seeds) < 2**63, "seeds must be below 2^63", max(self.seeds))
        check_path("out", self.out)
        for arm in self.arms:
            check_name("the name of an arm, its family and label,", arm.file(max(self.seeds)))
        for measure in self.measures:
            check_name("the name of a measure in measures", measure.rpartition(":")[2])
        names, files = [arm.name for arm in self.arms], {arm.file(0) for arm in self.arms}
        require(
            bool(names) and len(files) == len(names),
            "every arm needs a family and label of its own, where a space and a hyphen count as equal",
            names,
        )
        for arm in self.arms:
            require(arm.method in METHODS, f"an arm's method: {nearest(arm.method, list(METHODS))}", arm.method)


def settings_of(arm: ArmRecipe) -> SteeringRecipe:
    """Return the arm's steering recipe, checked. Raises InputError."""
    recipe = read_recipe(SteeringRecipe, arm.recipe, list(arm.changes))
    recipe.require_method(arm.method)
    check_rewards(recipe)
    return recipe


class Comparison:
    """A comparison's generator, prompts and rewards, loaded once; `prompts` are the lines of the recipe's file."""

    def __init__(self, recipe: ComparisonRecipe, prompts: list[str], device: torch.device):
        """Check all arms, then load everything. Raises InputError."""
        self.recipe, self.prompts, self.device = recipe, prompts[: recipe.count], device
        enough = len(self.prompts) == recipe.count
        require(
            enough, f"count must be at most {len(prompts)}, the number of prompts in {recipe.prompts}", recipe.count
        )
        read(Path(recipe.out).expanduser())  # results that are there already must be usable
        self.settings = {arm.name: settings_of(arm) for arm in recipe.arms}
        check_custom(recipe.reward)
        for name in recipe.measures:
            find_function(name)
        self.prompt_cache = PromptCache(recipe.model, recipe.cache, device)
        self.prompt_cache.ensure([*self.prompts, ""], progress=lambda items: tqdm(items, desc="encode prompts"))
        self.generator = Generator.load(recipe.model, device)
        self.architecture = architecture_of(recipe.model.path)
        self.reward = pixel_reward(recipe.reward, device)
        self.values: dict[str, Value] = {}  # by the arms' reward sections, each loaded once
        self.measures = {name.rpartition(":")[2]: FunctionReward(name) for name in recipe.measures}

    def denoiser(self, arm: ArmRecipe, seed: int, count: int) -> tuple[Denoiser, Value]:
        """Return the arm's denoiser of the first `count` prompts, and its value."""
        settings, prompts = replace(self.settings[arm.name], seed=seed), self.prompts[:count]
        rewards = repr((settings.rewards, settings.estimate, settings.rollouts))
        if rewards not in self.values:
            self.values[rewards] = load_value(settings, self.generator)
        value = self.values[rewards]
        conditions, negative = self.prompt_cache.conditions(prompts), self.prompt_cache.conditions([""])
        model = self.recipe.model
        each = candidate_bytes(self.architecture, model.resolution, model.text_length, self.generator.dtype)
        require_memory(arm.method, settings, each, free_memory(self.device))
        denoiser = make_denoiser(
            self.generator,
            prompts,
            conditions,
            negative,
            value=value,
            settings=settings,
            method=arm.method,
            kept=each,
        )
        return denoiser, value

    @torch.no_grad()
    def quality(self, arm: ArmRecipe, seed: int) -> dict[str, Any]:
        """Return the scores of one picture per prompt by the reward and every measure, and a row of their means.

        For fk, `founders` is among them: how many of a prompt's first particles have descendants at the end. Raises
        InputError.
        """
        denoiser, value = self.denoiser(arm, seed, len(self.prompts))
        settings = self.settings[arm.name]
        with progress_bar(denoiser, arm.method, settings) as bar:
            bar.set_description(f"{arm.name}, seed {seed}")
            steered = steer_prompts(denoiser, arm.method, value, settings, bar)
        images = torch.cat([self.generator.decode(part.best) for part in steered])
        scores = {"reward": self.reward.score(images, self.prompts)}
        check_finite("reward", scores["reward"])
        scores |= {name: measure.score(images, self.prompts) for name, measure in self.measures.items()}
        if arm.method == "fk":
            scores["founders"] = torch.cat([part.founders for part in steered])
        means = {name: float(values.double().mean()) for name, values in scores.items()}
        row = {"family": arm.family, "label": arm.label, "seed": seed, "prompts": len(images)} | means
        return {"row": row, "scores": {name: values.tolist() for name, values in scores.items()}}

    def cost(self, arm: ArmRecipe, repeats: int = 3) -> dict[str, Any]:
        """Return the median seconds and the GFLOP per picture, and the peak MiB in addition to the weights."""
        count, settings = self.recipe.cost_prompts, self.settings[arm.name]
        denoiser, value = self.denoiser(arm, 0, count)

        def call() -> Tensor:
            with tqdm(disable=True) as bar:
                steered = steer_prompts(denoiser, arm.method, value, settings, bar)
            with torch.no_grad():
                return torch.cat([self.generator.decode(part.best) for part in steered])

        cost = timed(call, count, self.device, repeats)
        milliseconds, gigaflop = cost["milliseconds"], cost["gigaflop"]
        assert milliseconds is not None
        return {
            "family": arm.family,
            "label": arm.label,
            "seconds": milliseconds / 1e3,
            "gigaflop": gigaflop,
            "peak_mib": peak_mib(call, self.device),
        }


def run(comparison: Comparison, cost: bool) -> None:
    """Measure every arm and seed that has no result yet or, with `cost`, the costs of all arms."""
    recipe, description = comparison.recipe, machine(comparison.device)
    folder = Path(recipe.out).expanduser()
    if cost:
        rows = [comparison.cost(arm) for arm in tqdm(recipe.arms, desc="costs", leave=False)]
        write_json(folder / "costs.json", description | {"rows": rows})
        return
    for seed in recipe.seeds:
        for arm in recipe.arms:
            path = folder / arm.file(seed)
            if not path.exists():
                write_json(path, description | {"arm": arm.__dict__} | comparison.quality(arm, seed))


def read(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of quality, with the scores of every prompt by measure (`scores`), and those of cost.

    Raises InputError for a result without these scores, as earlier versions wrote them.
    """
    quality = []
    for path in sorted(folder.glob("*-seed*.json")):
        content = json.loads(path.read_text())
        if "scores" not in content:
            raise InputError(f"{path} lacks the scores of each prompt; remove it and run the comparison again")
        quality.append(content["row"] | {"scores": content["scores"]})
    costs = folder / "costs.json"
    return quality, json.loads(costs.read_text())["rows"] if costs.is_file() else []
