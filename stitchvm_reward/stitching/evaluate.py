"""How good is a value model, beside a stitch to the raw latent, Tweedie's estimate and Monte Carlo."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.generator import Generator, encode
from stitchvm_reward.diffusion.path import denoised, noised
from stitchvm_reward.diffusion.solvers import ancestral_step, sigma_schedule
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards import find_function, load_reward
from stitchvm_reward.rewards.aesthetic import AestheticReward
from stitchvm_reward.rewards.clip import ClipReward, TextTower
from stitchvm_reward.runs import randomness
from stitchvm_reward.stitching.images import find_images
from stitchvm_reward.stitching.value_model import StitchedValueModel, levels, read_config

METHODS = ("stitched", "latent", "tweedie", "monte carlo")


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


class Evaluation:
    """A value model, the generator and the pixel reward that it stands for, and images to compare them on."""

    def __init__(
        self, folder: Path, baseline: Path | None, truth: str | None, question: Question, device: torch.device
    ):
        self.question, self.device = question, device
        self.truth = None if truth is None else find_function(truth)
        config = read_config(folder)
        own, reward = config["backbone"], config["reward"]
        dtype = getattr(torch, own["dtype"])
        self.generator = Generator.load(own["path"], dtype, device, config["resolution"])
        head = BackboneHead(self.generator.transformer)
        self.models = {"stitched": StitchedValueModel.from_pretrained(folder, device, head)}
        if baseline is not None:
            self.models["latent"] = StitchedValueModel.from_pretrained(baseline, device, head)
            if self.models["latent"].block != 0:
                raise InputError(f"{baseline} is not stitched to the raw latent (backbone.block=0)")
        self.null = self.models["stitched"].null
        self.reward = load_reward(reward["kind"], reward["path"], reward["head"], "", device)
        assert isinstance(self.reward, AestheticReward | ClipReward)  # what a value model can be stitched from
        self.reads_text = reward["kind"] == "clip"
        self.tower = self.reward.tower
        self.methods = [
            method
            for method in METHODS
            if method in self.models or method == "tweedie" or (method == "monte carlo" and question.rollouts)
        ]
        self.images, self.captions = self._load(config["resolution"])
        with torch.no_grad():
            parts = self.images.split(question.micro_batch)
            self.latents = torch.cat([encode(self.generator.vae, part).cpu() for part in parts])

    def _load(self, side: int) -> tuple[Tensor, list[str]]:
        found, question = find_images(self.question.images, "train", "image", "text", 0), self.question
        images, captions = [], []
        for index in range(len(found)):
            caption = found.caption(index) if self.reads_text or self.truth is not None else ""
            if self.reads_text and caption in captions:
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
            latents = ancestral_step(latents, clean, noise, now, following)
        return self.generator.decode(latents)

    @torch.no_grad()
    def value(
        self, method: str, latents: Tensor, sigma: float, texts: list[str], seed: int, rollouts: int = 0
    ) -> Tensor:
        """One method's estimate of the reward, (batch,) float32 on the CPU."""
        latents = latents.to(self.device)
        if method in self.models:
            return self.models[method].score(latents, sigma, texts).cpu()
        if method == "tweedie":
            return self.reward.score(self.tweedie(latents, sigma), texts).cpu()
        generator = torch.Generator().manual_seed(seed)
        count = rollouts or self.question.rollouts
        drawn = [self.reward.score(self.rolled_out(latents, sigma, generator), texts).cpu() for _ in range(count)]
        return torch.stack(drawn).mean(0)

    @torch.no_grad()
    def embedding(self, method: str, latents: Tensor, sigma: float) -> Tensor:
        """One method's normalised image embedding, for retrieval."""
        latents = latents.to(self.device)
        if method in self.models:
            model = self.models[method]
            return model.network(model.features(latents, levels(sigma, latents)))[1].cpu()
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
    text_embedding = None
    if evaluation.reads_text:
        text_embedding = TextTower(evaluation.tower.clip, evaluation.tower.folder).embed(texts).cpu()

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
                if text_embedding is not None and method != "monte carlo":
                    embeddings.append(evaluation.embedding(method, latents, sigma))
                    values.append((embeddings[-1] * text_embedding[r.start : r.stop]).sum(-1))
                else:
                    values.append(evaluation.value(method, latents, sigma, texts[r.start : r.stop], seed=r.start))
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
    cuda = evaluation.device.type == "cuda"
    for method in evaluation.methods:

        def once(chosen: str = method) -> None:
            evaluation.value(chosen, latents, 0.5, texts, 0)

        once()
        counter = FlopCounterMode(display=False)
        with counter:
            once()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            once()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        found.append(
            {
                "method": method,
                "milliseconds": sorted(times)[repeats // 2] / size * 1e3,
                "gigaflop": counter.get_total_flops() / size / 1e9,
                "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
            }
        )
    return found


def report(table: list[dict], errors: list[dict], costs: list[dict]) -> str:
    """All three as text, one line a method and one column a level."""
    sigmas = sorted({row["sigma"] for row in table if row["sigma"] is not None})
    lines = []
    measures = [key for key in ("spearman_clean", "spearman_true", "recall_text", "recall_image") if key in table[0]]
    for measure in measures:
        lines.append(f"{measure:<16}" + "".join(f"{sigma:>9g}" for sigma in sigmas) + f"{'clean':>9}")
        for method in dict.fromkeys(row["method"] for row in table[1:]):
            values = {row["sigma"]: row.get(measure) for row in table if row["method"] == method}
            cells = "".join(f"{values[s]:>9.3f}" if values.get(s) is not None else f"{'-':>9}" for s in sigmas)
            lines.append(f"{method:<16}{cells}" + (f"{table[0][measure]:>9.3f}" if method == "stitched" else ""))
    if errors:
        lines.append(f"{'squared error':<16}" + "".join(f"{sigma:>9g}" for sigma in sigmas))
        for method in dict.fromkeys(row["method"] for row in errors):
            values = {row["sigma"]: row["squared_error"] for row in errors if row["method"] == method}
            lines.append(f"{method:<16}" + "".join(f"{values[s]:>9.4f}" for s in sigmas))
    lines.append(f"{'cost of a score':<16}{'ms':>9}{'GFLOP':>9}{'MiB':>9}")
    for row in costs:
        memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append(f"{row['method']:<16}{row['milliseconds']:>9.2f}{row['gigaflop']:>9.3f}{memory:>9}")
    return "\n".join(lines)


def save(path: Path, **parts) -> None:
    """Write everything that was measured as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(parts, indent=1) + "\n")
