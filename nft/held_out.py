"""Evaluation during a run: held-out prompts, always from the same noise."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from nft.config import EvaluationRecipe
from nft.learner import Learner
from nft.rollout import sample
from nft.scoring import Scorer
from nft.untrained import UntrainedLatents
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.rewards import check_finite
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.geometry import share
from stitchvm_reward.runs.rank_sync import RankSync


def held_out_metrics(scores: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean and the spread (sample standard deviation) of each measure's scores (prompts,) as metrics."""
    metrics = {}
    for name, values in scores.items():
        metrics[f"held_out/{name}"] = float(values.mean())
        metrics[f"held_out/{name}_std"] = float(values.std())
    return metrics


class HeldOut:
    """Samples held-out images of an adapter and measures them, `micro_batch` images at once.

    `starts_as_base` tells whether the policy of epoch 0 is the base model, whose latents `untrained` keeps.
    """

    def __init__(
        self,
        prompts: list[str],
        *,
        cache: PromptCache,
        generator: Generator,
        learner: Learner,
        scorer: Scorer,
        untrained: UntrainedLatents,
        ranks: RankSync,
        seed: int,
        evaluation: EvaluationRecipe,
        micro_batch: int,
        starts_as_base: bool,
    ):
        self.prompts, self.cache, self.generator, self.learner = prompts, cache, generator, learner
        self.scorer, self.untrained, self.ranks, self.seed = scorer, untrained, ranks, seed
        self.sigmas, self.grid = generator.sigmas(evaluation.steps), evaluation.grid
        self.micro_batch, self.starts_as_base = micro_batch, starts_as_base
        self.grids: dict[int, Tensor] = {}  # of epoch 0 and of the last evaluation

    @torch.no_grad()
    def images(self, adapter: str | None, indices: list[int]) -> Tensor:
        """Return images (len(indices), 3, h, w) in [0, 1] of some prompts by one adapter, or by the base model."""
        conditions = self.cache.conditions([self.prompts[n] for n in indices])
        noise = randomness.noise(self.generator.latent_shape, self.seed, randomness.EVALUATION, 0, indices)

        def make() -> Tensor:
            with self.learner.policy.using(adapter):
                return sample(self.generator, self.learner.sampler, conditions, noise, self.sigmas)

        if adapter is None:
            return self.generator.decode(self.untrained.get(conditions, noise, self.sigmas, make))
        return self.generator.decode(make())

    def _adapter(self, epoch: int) -> str | None:
        """Return the adapter that an evaluation looks at. Adapters that are still zero need not be computed."""
        return None if epoch == 0 and self.starts_as_base else "ema"

    def evaluate(self, epoch: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return the averaged policy's rewards and measures and its first `grid` images in bytes, over all processes.

        Scores are (prompts,) on the CPU, in the order of the prompts; `held_out_metrics` sums them up. Raises
        SharedError where a reward is not finite.
        """
        count = len(self.prompts)
        scores: dict[str, list[tuple[list[int], Tensor]]] = {}
        shown: list[tuple[list[int], Tensor]] = []

        def measure(indices: list[int]) -> None:
            images = self.images(self._adapter(epoch), indices)
            for name, values in self.scorer.measure(images, [self.prompts[n] for n in indices]).items():
                scores.setdefault(name, []).append((indices, values))
            self._show(indices, images, shown)

        with self.ranks.timings.phase("evaluate"):
            self._each_batch(f"epoch {epoch} evaluate", count, measure)
            found = {}
            for name in [*self.scorer.rewards, "total", *self.scorer.metrics]:
                found[name] = self.ranks.gather(scores.get(name, []), count).cpu()
                if name not in self.scorer.metrics:
                    check_finite(name, found[name])
            pictures = self._gather(shown)
        self.grids = {n: grid for n, grid in self.grids.items() if n == 0} | {epoch: pictures}
        return found, pictures

    def before_and_after(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the first `grid` images of the base model and of the averaged policy after an epoch, in bytes.

        Those that an evaluation of this process has seen are not made again; all processes make the others together.
        """
        before = self.grids.get(0) if self.starts_as_base else None
        after = self.grids.get(epoch)
        with self.ranks.timings.phase("draw"):
            return (
                self._pictures(None) if before is None else before,
                self._pictures(self._adapter(epoch)) if after is None else after,
            )

    def _pictures(self, adapter: str | None) -> Tensor:
        shown: list[tuple[list[int], Tensor]] = []
        self._each_batch("draw", self.grid, lambda indices: self._show(indices, self.images(adapter, indices), shown))
        return self._gather(shown)

    def _each_batch(self, title: str, count: int, work: Callable[[list[int]], None]) -> None:
        """Call `work` with the indices of this process's batches that hold any of the first `count` prompts."""
        accelerator = self.ranks.accelerator
        part = share(len(self.prompts), accelerator.process_index, accelerator.num_processes)
        starts = [start for start in range(part.start, part.stop, self.micro_batch) if start < count]
        bar = tqdm(
            desc=title,
            total=len(starts),
            leave=False,
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )
        with bar:
            for start in self.ranks.rounds(starts):
                with self.ranks.together():
                    if start is not None:
                        work(list(range(start, min(start + self.micro_batch, part.stop))))
                        bar.update()

    def _show(self, indices: list[int], images: Tensor, shown: list[tuple[list[int], Tensor]]) -> None:
        """Add those of a batch's images to `shown` that belong to the grid."""
        kept = [n for n in indices if n < self.grid]
        if kept:
            shown.append((kept, images[: len(kept)]))

    def _gather(self, shown: list[tuple[list[int], Tensor]]) -> Tensor:
        side = self.generator.resolution
        return self.ranks.gather(shown or [([0], torch.zeros(1, 3, side, side))], self.grid)
