"""Evaluation during a run: held-out prompts, always from the same noise."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nft.config import EvaluationRecipe
from nft.learner import Learner
from nft.rollout import sample
from nft.scoring import Scorer
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.rewards import check_finite
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.geometry import share
from stitchvm_reward.runs.pictures import before_after
from stitchvm_reward.runs.rank_sync import RankSync


class HeldOut:
    """Samples held-out images of an adapter and measures them, `micro_batch` images at once."""

    def __init__(
        self,
        prompts: list[str],
        *,
        cache: PromptCache,
        generator: Generator,
        learner: Learner,
        scorer: Scorer,
        ranks: RankSync,
        seed: int,
        evaluation: EvaluationRecipe,
        micro_batch: int,
    ):
        self.prompts, self.cache, self.generator, self.learner = prompts, cache, generator, learner
        self.scorer, self.ranks, self.seed = scorer, ranks, seed
        self.sigmas, self.grid = generator.sigmas(evaluation.steps), evaluation.grid
        self.micro_batch = micro_batch

    @torch.no_grad()
    def images(self, adapter: str | None, indices: list[int]) -> Tensor:
        """Return images (len(indices), 3, h, w) in [0, 1] of some prompts by one adapter, or by the base model."""
        conditions = self.cache.conditions([self.prompts[n] for n in indices])
        noise = randomness.noise(self.generator.latent_shape, self.seed, randomness.EVALUATION, 0, indices)
        with self.learner.policy.using(adapter):
            latents = sample(self.generator, self.learner.sampler, conditions, noise, self.sigmas)
        return self.generator.decode(latents)

    def evaluate(self, epoch: int) -> tuple[dict[str, float], Tensor]:
        """Return rewards and measures of the averaged policy over all processes, and the first `grid` images in bytes.

        Raises SharedError where a reward is not finite.
        """
        count, accelerator = len(self.prompts), self.ranks.accelerator
        part = share(count, accelerator.process_index, accelerator.num_processes)
        scores: dict[str, list[tuple[list[int], Tensor]]] = {}
        shown: list[tuple[list[int], Tensor]] = []
        starts = range(part.start, part.stop, self.micro_batch)
        bar = tqdm(
            desc=f"epoch {epoch} evaluate",
            total=len(starts),
            leave=False,
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )
        with self.ranks.timings.phase("evaluate"), bar:
            for start in self.ranks.rounds(starts):
                with self.ranks.together():
                    if start is not None:
                        self._measure(list(range(start, min(start + self.micro_batch, part.stop))), scores, shown)
                        bar.update()
            metrics = {}
            for name in [*self.scorer.rewards, "total", *self.scorer.metrics]:
                values = self.ranks.gather(scores.get(name, []), count)
                if name not in self.scorer.metrics:
                    check_finite(name, values)
                metrics[f"held_out/{name}"] = float(values.mean())
                metrics[f"held_out/{name}_std"] = float(values.std())
            side = self.generator.resolution
            pictures = self.ranks.gather(shown or [([0], torch.zeros(1, 3, side, side))], self.grid)
        return metrics, pictures

    def _measure(self, indices: list[int], scores: dict[str, list], shown: list) -> None:
        """Add the scores of some prompts' images to `scores`, and those of the first images to `shown`."""
        images = self.images("ema", indices)
        for name, values in self.scorer.measure(images, [self.prompts[n] for n in indices]).items():
            scores.setdefault(name, []).append((indices, values))
        kept = [n for n in indices if n < self.grid]
        if kept:
            shown.append((kept, images[: len(kept)]))

    def draw(self, path: Path) -> None:
        """Write the grid of images before and after training as PNG."""
        indices = list(range(self.grid))
        before, after = (torch.cat([self.images(a, [n]).cpu() for n in indices]) for a in (None, "ema"))
        before_after(before, after, [self.prompts[n] for n in indices], path)
