"""The quality of value models of one reward, compared with Tweedie's estimate and with Monte Carlo rollouts."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.path import denoised, noised
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.diffusion.solvers import sde_step
from stitchvm_reward.errors import InputError
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.measure import timed
from stitchvm_reward.rewards import FunctionReward, load_reward
from stitchvm_reward.rewards.aesthetic import AestheticReward
from stitchvm_reward.rewards.clip import ClipReward
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.pictures import save_figure
from stitchvm_reward.runs.run_folder import arm_of
from stitchvm_reward.stitching.images import find_images
from stitchvm_reward.stitching.value_model import StitchedValueModel, levels, read_config

MEASURES = ("spearman_clean", "spearman_true", "recall_text", "recall_image")


@dataclass(frozen=True)
class ValueEvaluationConfig:
    """What is measured: on how many images, at which noise levels and against how many rollouts."""

    images: str
    count: int
    sigmas: list[float]
    micro_batch: int = 32
    rollouts: int = 4
    rollout_steps: int = 25
    truth_latents: int = 8
    truth_rollouts: int = 64
    seed: int = 0
    cache: str = "~/.cache/stitch-nft/prompts"


def _names(folders: list[Path]) -> dict[str, Path]:
    """Return the folders by the name of the run that wrote them. Raises InputError if two have the same name."""
    names = [folder.resolve().parent.name if folder.name == "value_model" else folder.name for folder in folders]
    for name in names:
        if names.count(name) > 1 or name in ("clean", "tweedie", "monte carlo"):
            raise InputError(f"every value model needs a unique name, {name} is taken; rename its run folder")
    return dict(zip(names, folders, strict=True))


def _common_config(configs: dict[str, dict]) -> dict:
    """Return the first of several configurations. Raises InputError unless all have one reward and one backbone."""
    (first, config), *others = configs.items()
    for name, other in others:
        for key in ("reward", "backbone"):
            if any(config[key].get(part) != other[key].get(part) for part in ("kind", "path", "head")):
                raise InputError(f"{name} and {first} do not have the same {key}; compare models of one reward only")
    return config


class Evaluation:
    """Value models of one reward, the generator, the reward itself, and the images on which they are compared."""

    def __init__(self, folders: list[Path], truth: str | None, recipe: ValueEvaluationConfig, device: torch.device):
        self.recipe, self.device = recipe, device
        self.truth = None if truth is None else FunctionReward(truth)
        named = _names(folders)
        config = _common_config({name: read_config(folder) for name, folder in named.items()})
        backbone, reward = config["backbone"], config["reward"]
        names = ("path", "dtype", "resolution", "text_length", "guidance")
        model = ModelRecipe(**{name: backbone[name] for name in names})
        self.generator = Generator.load(model, device)
        head = BackboneHead.of(self.generator)
        self.models = {name: StitchedValueModel.from_pretrained(folder, device, head) for name, folder in named.items()}
        self.null = next(iter(self.models.values())).null
        self.reward = load_reward(RewardRecipe(kind=reward["kind"], model=reward["path"], head=reward["head"]), device)
        assert isinstance(self.reward, AestheticReward | ClipReward)  # value models are stitched from these only
        self.texts = self.reward.texts if isinstance(self.reward, ClipReward) else None
        self.reads_captions = any(model.conditioning == "prompt" for model in self.models.values())
        self.tower = self.reward.tower
        self.methods = [*self.models, "tweedie", *(["monte carlo"] if recipe.rollouts else [])]
        self.images, self.captions = self._load(config["resolution"])
        self.prompt_cache = PromptCache(model, recipe.cache, device)
        if self.reads_captions:
            self.prompt_cache.ensure(self.captions)
        parts = self.images.split(recipe.micro_batch)
        self.latents = torch.cat([self.generator.encode(part).cpu() for part in parts])

    def _load(self, side: int) -> tuple[Tensor, list[str]]:
        recipe = self.recipe
        image_set = find_images(recipe.images, "train", "image", "text", 0)
        images, captions = [], []
        for index in range(len(image_set)):
            needed = self.texts is not None or self.reads_captions or self.truth is not None
            caption = image_set.caption(index) if needed else ""
            if self.texts is not None and caption in captions:
                continue  # retrieval needs a unique answer
            image = image_set.load(index, side)
            if image is not None:
                images.append(image)
                captions.append(caption)
            if len(images) == recipe.count:
                return torch.stack(images), captions
        raise InputError(f"{recipe.images} has {len(images)} usable images, {recipe.count} were requested")

    def noisy(self, sigma: float, rows: range) -> Tensor:
        """Return the latents of some images at a level; each image has its own noise."""
        clean = self.latents[rows.start : rows.stop]
        address = (self.recipe.seed, randomness.EVALUATION, int(sigma * 1e6))
        return noised(clean, randomness.noise(clean.shape[1:], *address, list(rows)), torch.full((len(clean),), sigma))

    def tweedie(self, latents: Tensor, sigma: float) -> Tensor:
        """Return the images of Tweedie's estimate of the clean latents."""
        level = torch.full((len(latents),), sigma, device=self.device)
        velocity = self.generator.velocity(latents, level, self.null.expand(len(latents))).float()
        return self.generator.decode(denoised(latents, velocity, torch.tensor(sigma)))

    def rolled_out(self, latents: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
        """Return the images of one stochastic rollout of each latent to level 0."""
        grid = self.generator.sigmas(self.recipe.rollout_steps)
        schedule = [sigma, *(level for level in grid if level < sigma - 0.02)]
        for now, following in zip(schedule, schedule[1:]):
            level = torch.full((len(latents),), now, device=self.device)
            velocity = self.generator.velocity(latents, level, self.null.expand(len(latents))).float()
            clean = denoised(latents, velocity, torch.tensor(now))
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            latents = sde_step(latents, clean, noise, now, following)
        return self.generator.decode(latents)

    def _conditions(self, method: str, texts: list[str]) -> Conditions | None:
        """Return the conditions of the captions, or None if the model's backbone does not read them."""
        reads = self.models[method].conditioning == "prompt"
        return self.prompt_cache.conditions(texts) if reads else None

    @torch.no_grad()
    def value(
        self, method: str, latents: Tensor, sigma: float, texts: list[str], *, seed: int, rollouts: int = 0
    ) -> Tensor:
        """Return a method's estimate of the reward, (batch,) float32 on the CPU."""
        latents = latents.to(self.device)
        if method in self.models:
            return self.models[method].score(latents, sigma, texts, self._conditions(method, texts)).cpu()
        if method == "tweedie":
            return self.reward.score(self.tweedie(latents, sigma), texts).cpu()
        generator = torch.Generator().manual_seed(seed)
        count = rollouts or self.recipe.rollouts
        drawn = [self.reward.score(self.rolled_out(latents, sigma, generator), texts).cpu() for _ in range(count)]
        return torch.stack(drawn).mean(0)

    @torch.no_grad()
    def embedding(self, method: str, latents: Tensor, sigma: float, texts: list[str]) -> Tensor:
        """Return a method's normalised image embeddings, for retrieval."""
        latents = latents.to(self.device)
        if method in self.models:
            model = self.models[method]
            features = model.features(latents, levels(sigma, latents), self._conditions(method, texts))
            return model.network(features)[1].cpu()
        return self.tower.embed(self.tweedie(latents, sigma)).cpu()

    def rows(self) -> list[range]:
        """Return the positions of the images in micro batches."""
        size, count = self.recipe.micro_batch, len(self.images)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _rank(first: Tensor, second: Tensor) -> float:
    return float(spearmanr(first.double(), second.double()).statistic)


def recall(images: Tensor, texts: Tensor) -> tuple[float, float]:
    """Return the share of images whose nearest text is their own, and of texts whose nearest image is their own."""
    similarity, target = images @ texts.T, torch.arange(len(images))
    to_text, to_image = similarity.argmax(1) == target, similarity.argmax(0) == target
    return float(to_text.float().mean()), float(to_image.float().mean())


def quality(evaluation: Evaluation) -> list[dict]:
    """Return one row per method and level.

    A row holds Spearman's correlation with the clean reward and with the true score, and recall in both directions.
    """
    rows, texts = evaluation.rows(), evaluation.captions
    with torch.no_grad():
        clean = torch.cat(
            [evaluation.reward.score(evaluation.images[r.start : r.stop], texts[r.start : r.stop]).cpu() for r in rows]
        )
        embedded = torch.cat([evaluation.tower.embed(evaluation.images[r.start : r.stop]).cpu() for r in rows])
    truth = None if evaluation.truth is None else evaluation.truth.score(evaluation.images, texts)
    reader = evaluation.texts
    text_embedding = None if reader is None else reader.embed(texts).cpu()

    def row(method: str, sigma: float | None, values: Tensor, embedding: Tensor | None) -> dict:
        measures: dict = {"method": method, "sigma": sigma, "spearman_clean": _rank(values, clean)}
        if truth is not None:
            measures["spearman_true"] = _rank(values, truth)
        if text_embedding is not None and embedding is not None:
            measures["recall_text"], measures["recall_image"] = recall(embedding, text_embedding)
        return measures

    table = [row("clean", None, clean, embedded)]
    for sigma in tqdm(evaluation.recipe.sigmas, desc="levels"):
        for method in evaluation.methods:
            values, embeddings = [], []
            for r in rows:
                latents = evaluation.noisy(sigma, r)
                part = texts[r.start : r.stop]
                if reader is not None and method != "monte carlo":
                    embeddings.append(evaluation.embedding(method, latents, sigma, part))
                    values.append(reader.score(embeddings[-1], part))
                else:
                    values.append(evaluation.value(method, latents, sigma, part, seed=r.start))
            table.append(row(method, sigma, torch.cat(values), torch.cat(embeddings) if embeddings else None))
    return table


def truth_error(evaluation: Evaluation) -> list[dict]:
    """Return the mean squared error of each method against many rollouts, on a few latents, by level."""
    recipe, table = evaluation.recipe, []
    rows = range(min(recipe.truth_latents, len(evaluation.images)))
    texts = evaluation.captions[: len(rows)]
    for sigma in recipe.sigmas:
        latents = evaluation.noisy(sigma, rows)
        truth = evaluation.value("monte carlo", latents, sigma, texts, seed=10_001, rollouts=recipe.truth_rollouts)
        for method in evaluation.methods:
            values = evaluation.value(method, latents, sigma, texts, seed=20_002)
            error = float((values - truth).square().mean())
            table.append({"method": method, "sigma": sigma, "squared_error": error, "rollouts": recipe.truth_rollouts})
    return table


def cost(evaluation: Evaluation, repeats: int = 5) -> list[dict]:
    """Return milliseconds, GFLOP and, on a GPU, peak MiB of one score, in micro batches at level 0.5."""
    table = []
    size = min(evaluation.recipe.micro_batch, len(evaluation.images))
    latents, texts = evaluation.noisy(0.5, range(size)), evaluation.captions[:size]
    for method in evaluation.methods:
        score = functools.partial(evaluation.value, method, latents, 0.5, texts, seed=0)
        table.append({"method": method, "sigma": None, **timed(score, size, evaluation.device, repeats)})
    return table


def _cells(rows: list[dict], measure: str, sigma: float | None) -> str:
    """Return the mean of a measure over runs, with its standard error if there are several."""
    values = [row[measure] for row in rows if row["sigma"] == sigma and row.get(measure) is not None]
    if not values:
        return f"{'-':>14}"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:>14.3f}"
    error = (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5
    return f"{mean:>8.3f} ±{error:.3f}"


def _by_arm(rows: list[dict]) -> dict[str, list[dict]]:
    arms: dict[str, list[dict]] = {}
    for row in rows:
        arms.setdefault(arm_of(row["method"]), []).append(row)
    return arms


def report(table: list[dict], errors: list[dict], costs: list[dict]) -> str:
    """Return all three as text: one line per method, one column per level. Models named -seedN form one method."""
    sigmas = sorted({row["sigma"] for row in table if row["sigma"] is not None})
    head = "".join(f"{sigma:>14g}" for sigma in sigmas)
    width = max(len(row["method"]) for row in table) + 2
    lines = []
    for measure in [measure for measure in MEASURES if measure in table[0]]:
        lines += ["", f"{measure:<{width}}{head}   (clean images: {table[0][measure]:.3f})"]
        for name, rows in _by_arm(table[1:]).items():
            lines.append(f"{name:<{width}}" + "".join(_cells(rows, measure, sigma) for sigma in sigmas))
    if errors:
        lines += ["", f"{'squared error':<{width}}{head}"]
        for name, rows in _by_arm(errors).items():
            lines.append(f"{name:<{width}}" + "".join(_cells(rows, "squared_error", sigma) for sigma in sigmas))
    lines += ["", f"{'one score':<{width}}{'ms':>14}{'GFLOP':>14}{'MiB':>14}"]
    for name, rows in _by_arm(costs).items():
        cells = [_cells(rows, key, None) for key in ("milliseconds", "gigaflop", "peak_mib")]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def draw(table: list[dict], path: Path) -> None:
    """Draw each measure over the noise level as PNG: a curve per method, a point per run, clean images dotted."""
    from matplotlib.figure import Figure

    measures = [measure for measure in MEASURES if measure in table[0]]
    figure = Figure(figsize=(5 * len(measures), 3.6), layout="constrained")
    for place, measure in enumerate(measures):
        axes = figure.add_subplot(1, len(measures), place + 1)
        axes.axhline(table[0][measure], color="grey", linestyle=":", label="clean images")
        for number, (name, rows) in enumerate(_by_arm(table[1:]).items()):
            known = [row for row in rows if row.get(measure) is not None]
            sigmas = sorted({row["sigma"] for row in known})
            means = [[row[measure] for row in known if row["sigma"] == sigma] for sigma in sigmas]
            if known:
                axes.plot([r["sigma"] for r in known], [r[measure] for r in known], ".", color=f"C{number}")
                axes.plot(sigmas, [sum(m) / len(m) for m in means], color=f"C{number}", label=name)
        axes.set_xlabel("sigma")
        axes.set_ylabel(measure)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    save_figure(figure, path)
