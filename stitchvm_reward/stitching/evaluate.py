"""How good are value models (stitched to blocks or to the raw latent), beside Tweedie's estimate and Monte Carlo."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.generator import Conditions, Generator, PromptEmbeddings, encode
from stitchvm_reward.diffusion.path import denoised, noised
from stitchvm_reward.diffusion.solvers import sde_step, sigma_schedule
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards import find_function, load_reward
from stitchvm_reward.rewards.aesthetic import AestheticReward
from stitchvm_reward.rewards.clip import ClipReward
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.run_folder import arm_of
from stitchvm_reward.stitching.benchmark import timed
from stitchvm_reward.stitching.images import find_images
from stitchvm_reward.stitching.value_model import StitchedValueModel, levels, read_config

MEASURES = ("spearman_clean", "spearman_true", "recall_text", "recall_image")


@dataclass(frozen=True)
class Question:
    """What is measured: on how many images, at which levels, against how many rollouts."""

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
    """Folders by the run that wrote them. Raises InputError where two have one name."""
    names = [folder.resolve().parent.name if folder.name == "value_model" else folder.name for folder in folders]
    for name in names:
        if names.count(name) > 1 or name in ("clean", "tweedie", "monte carlo"):
            raise InputError(f"every value model needs a name of its own, {name} is taken; rename its run folder")
    return dict(zip(names, folders, strict=True))


def _one_of_all(configs: dict[str, dict]) -> dict:
    """The first of some value models' configurations. Raises InputError unless all stand for one reward."""
    (first, one), *others = configs.items()
    for name, other in others:
        for key in ("reward", "backbone"):
            if any(one[key].get(part) != other[key].get(part) for part in ("kind", "path", "head")):
                raise InputError(f"{name} and {first} have not the same {key}; compare models of one reward only")
    return one


class Evaluation:
    """Value models of one reward, the generator and that reward itself, and images to compare them on."""

    def __init__(self, folders: list[Path], truth: str | None, question: Question, device: torch.device):
        self.question, self.device = question, device
        self.truth = None if truth is None else find_function(truth)
        named = _names(folders)
        config = _one_of_all({name: read_config(folder) for name, folder in named.items()})
        own, reward = config["backbone"], config["reward"]
        dtype = getattr(torch, own["dtype"])
        self.generator = Generator.load(own["path"], dtype, device, config["resolution"])
        head = BackboneHead(self.generator.transformer)
        self.models = {name: StitchedValueModel.from_pretrained(folder, device, head) for name, folder in named.items()}
        self.null = next(iter(self.models.values())).null
        self.reward = load_reward(reward["kind"], reward["path"], reward["head"], "", device)
        assert isinstance(self.reward, AestheticReward | ClipReward)  # what a value model can be stitched from
        self.texts = self.reward.texts if isinstance(self.reward, ClipReward) else None
        self.reads_captions = any(model.conditioning == "prompt" for model in self.models.values())
        self.tower = self.reward.tower
        self.methods = [*self.models, "tweedie", *(["monte carlo"] if question.rollouts else [])]
        self.images, self.captions = self._load(config["resolution"])
        self.embeddings = PromptEmbeddings(own["path"], question.cache, own["t5_length"], dtype, device)
        if self.reads_captions:
            self.embeddings.ensure(self.captions)
        with torch.no_grad():
            parts = self.images.split(question.micro_batch)
            self.latents = torch.cat([encode(self.generator.vae, part).cpu() for part in parts])

    def _load(self, side: int) -> tuple[Tensor, list[str]]:
        found, question = find_images(self.question.images, "train", "image", "text", 0), self.question
        images, captions = [], []
        for index in range(len(found)):
            needed = self.texts is not None or self.reads_captions or self.truth is not None
            caption = found.caption(index) if needed else ""
            if self.texts is not None and caption in captions:
                continue  # retrieval needs one right answer
            image = found.load(index, side)
            if image is not None:
                images.append(image)
                captions.append(caption)
            if len(images) == question.count:
                return torch.stack(images), captions
        raise InputError(
            f"{question.images} has {len(images)} images that can be used, {question.count} were asked for"
        )

    def noisy(self, sigma: float, rows: range) -> Tensor:
        """Latents of some images at a level, each with noise of its own address."""
        clean = self.latents[rows.start : rows.stop]
        address = (self.question.seed, randomness.EVALUATION, int(sigma * 1e6))
        return noised(clean, randomness.noise(clean.shape[1:], *address, list(rows)), torch.full((len(clean),), sigma))

    def tweedie(self, latents: Tensor, sigma: float) -> Tensor:
        """Images of Tweedie's estimate of the clean latents."""
        level = torch.full((len(latents),), sigma, device=self.device)
        velocity = self.generator.velocity(latents, level, self.null.expand(len(latents))).float()
        return self.generator.decode(denoised(latents, velocity, torch.tensor(sigma)))

    def rolled_out(self, latents: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
        """Images of one stochastic rollout of each latent down to level 0."""
        grid = sigma_schedule(self.question.rollout_steps, self.generator.shift)
        schedule = [sigma, *(level for level in grid if level < sigma - 0.02)]
        for now, following in zip(schedule, schedule[1:]):
            level = torch.full((len(latents),), now, device=self.device)
            velocity = self.generator.velocity(latents, level, self.null.expand(len(latents))).float()
            clean = denoised(latents, velocity, torch.tensor(now))
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            latents = sde_step(latents, clean, noise, now, following)
        return self.generator.decode(latents)

    def _conditions(self, method: str, texts: list[str]) -> Conditions | None:
        """What a model's backbone reads of captions, where it reads them."""
        reads = self.models[method].conditioning == "prompt"
        return self.embeddings.conditions(texts) if reads else None

    @torch.no_grad()
    def value(
        self, method: str, latents: Tensor, sigma: float, texts: list[str], seed: int, rollouts: int = 0
    ) -> Tensor:
        """One method's estimate of the reward, (batch,) float32 on the CPU."""
        latents = latents.to(self.device)
        if method in self.models:
            return self.models[method].score(latents, sigma, texts, self._conditions(method, texts)).cpu()
        if method == "tweedie":
            return self.reward.score(self.tweedie(latents, sigma), texts).cpu()
        generator = torch.Generator().manual_seed(seed)
        count = rollouts or self.question.rollouts
        drawn = [self.reward.score(self.rolled_out(latents, sigma, generator), texts).cpu() for _ in range(count)]
        return torch.stack(drawn).mean(0)

    @torch.no_grad()
    def embedding(self, method: str, latents: Tensor, sigma: float, texts: list[str]) -> Tensor:
        """One method's normalised image embedding, for retrieval."""
        latents = latents.to(self.device)
        if method in self.models:
            model = self.models[method]
            return model.network(model.features(latents, levels(sigma, latents), self._conditions(method, texts)))[
                1
            ].cpu()
        return self.tower.embed(self.tweedie(latents, sigma)).cpu()

    def rows(self) -> list[range]:
        """The images in micro batches."""
        size, count = self.question.micro_batch, len(self.images)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _rank(first: Tensor, second: Tensor) -> float:
    return float(spearmanr(first.double(), second.double()).statistic)


def recall(images: Tensor, texts: Tensor) -> tuple[float, float]:
    """Share of images whose nearest text is their own, and of texts whose nearest image is."""
    similarity, own = images @ texts.T, torch.arange(len(images))
    return float((similarity.argmax(1) == own).float().mean()), float((similarity.argmax(0) == own).float().mean())


def quality(evaluation: Evaluation) -> list[dict]:
    """One row a method and level: Spearman with the clean reward and with the true score, recall both ways."""
    rows, texts = evaluation.rows(), evaluation.captions
    with torch.no_grad():
        clean = torch.cat(
            [evaluation.reward.score(evaluation.images[r.start : r.stop], texts[r.start : r.stop]).cpu() for r in rows]
        )
        embedded = torch.cat([evaluation.tower.embed(evaluation.images[r.start : r.stop]).cpu() for r in rows])
    truth = None if evaluation.truth is None else evaluation.truth(evaluation.images, texts)
    reader = evaluation.texts
    text_embedding = None if reader is None else reader.embed(texts).cpu()

    def row(method: str, sigma: float | None, values: Tensor, embedding: Tensor | None) -> dict:
        found: dict = {"method": method, "sigma": sigma, "spearman_clean": _rank(values, clean)}
        if truth is not None:
            found["spearman_true"] = _rank(values, truth)
        if text_embedding is not None and embedding is not None:
            found["recall_text"], found["recall_image"] = recall(embedding, text_embedding)
        return found

    table = [row("clean", None, clean, embedded)]
    for sigma in tqdm(evaluation.question.sigmas, desc="levels"):
        for method in evaluation.methods:
            values, embeddings = [], []
            for r in rows:
                latents = evaluation.noisy(sigma, r)
                own = texts[r.start : r.stop]
                if reader is not None and method != "monte carlo":
                    embeddings.append(evaluation.embedding(method, latents, sigma, own))
                    values.append(reader.score(embeddings[-1], own))
                else:
                    values.append(evaluation.value(method, latents, sigma, own, seed=r.start))
            table.append(row(method, sigma, torch.cat(values), torch.cat(embeddings) if embeddings else None))
    return table


def truth_error(evaluation: Evaluation) -> list[dict]:
    """Mean squared error of each method against many rollouts, on a few latents, by level."""
    question, found = evaluation.question, []
    rows = range(min(question.truth_latents, len(evaluation.images)))
    texts = evaluation.captions[: len(rows)]
    for sigma in question.sigmas:
        latents = evaluation.noisy(sigma, rows)
        truth = evaluation.value("monte carlo", latents, sigma, texts, 10_001, question.truth_rollouts)
        for method in evaluation.methods:
            values = evaluation.value(method, latents, sigma, texts, 20_002)
            error = float((values - truth).square().mean())
            found.append(
                {"method": method, "sigma": sigma, "squared_error": error, "rollouts": question.truth_rollouts}
            )
    return found


def cost(evaluation: Evaluation, repeats: int = 5) -> list[dict]:
    """Milliseconds, GFLOP and, on a GPU, peak MiB of one score, in micro batches at level .5, all in this one run."""
    question, found = evaluation.question, []
    size = min(question.micro_batch, len(evaluation.images))
    latents, texts = evaluation.noisy(0.5, range(size)), evaluation.captions[:size]
    for method in evaluation.methods:
        score = functools.partial(evaluation.value, method, latents, 0.5, texts, 0)
        found.append({"method": method, "sigma": None, **timed(score, size, evaluation.device, repeats)})
    return found


def _cells(rows: list[dict], measure: str, sigma: float | None) -> str:
    """Mean of a measure over runs, with the standard error of it where there are several."""
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
    """All three as text, one line a method and one column a level; models that differ in -seedN are one method."""
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
    """Each measure over the noise level as PNG, one curve a method with all of its runs, clean images dotted."""
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
    figure.savefig(path, dpi=110)
