"""The audit of a value model: does its value still follow the true reward of what its latents become?"""

from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from nft.learner import Learner
from nft.rollout import Rollout, RolloutRecipe, continue_rollout
from nft.scoring import Scorer
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.errors import SharedError
from stitchvm_reward.rewards import check_finite
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.rank_sync import RankSync
from stitchvm_reward.runs.recipe import at_least, one_of, positive, require
from stitchvm_reward.transfer import to_device

KEPT = 3  # audits that are judged together: a single one has too few samples


@dataclass
class AuditRecipe:
    every: int = 0
    """Epochs between audits of a value model: some stopped samples are rolled out to the image and scored by the true
    reward. 0: never."""
    samples: int = 32
    """Samples of an audit, over all processes."""
    on_drift: str = "warn"
    """warn or stop, when value and true reward have come apart."""
    least_spearman: float = 0.3
    """They have come apart when their rank correlation, the mean of the last three audits, is below this value."""
    most_slope: float = 1.75
    """Or when the true reward changes by more than this many times the change of the value, or by less than the inverse
    (the slope of their regression over the last three audits; 1 is calibrated)."""
    most_bias: float = 1.5
    """Or when the mean value has risen above the mean true reward by this many standard deviations of the true reward
    more than in the first three audits."""

    def __post_init__(self):
        at_least("audit.every", self.every, 0)
        at_least("audit.samples", self.samples, 8)
        one_of("audit.on_drift", self.on_drift, ("warn", "stop"))
        require(-1 <= self.least_spearman <= 1, "audit.least_spearman must be in [-1, 1]", self.least_spearman)
        require(self.most_slope > 1, "audit.most_slope must be above 1", self.most_slope)
        positive("audit.most_bias", self.most_bias)


def audited(samples: int, count: int, seed: int, epoch: int) -> set[int]:
    """Return which of an epoch's samples are rolled out to the image, the same on every process."""
    order = torch.randperm(samples, generator=randomness.at(seed, randomness.AUDIT, epoch))
    return set(order[:count].tolist())


@dataclass
class Audit:
    """Pairs of value and true reward of the latest audits, and how far apart they were at first."""

    recipe: AuditRecipe
    pairs: list[list[list[float]]] = field(default_factory=list)
    first_bias: list[float] = field(default_factory=list)

    def add(self, values: Tensor, rewards: Tensor) -> dict[str, float]:
        """Add one audit's values and true rewards, (samples,) each, and return its metrics.

        `bias` is the mean value minus the mean reward of this audit; `slope` and `spearman` are over all kept audits.
        """
        values, rewards = values.double(), rewards.double()
        self.pairs = [*self.pairs, [values.tolist(), rewards.tolist()]][-KEPT:]
        bias = float(values.mean() - rewards.mean())
        if len(self.first_bias) < KEPT:
            self.first_bias.append(bias)
        return {
            "audit/value": float(values.mean()),
            "audit/reward": float(rewards.mean()),
            "audit/bias": bias,
            "audit/slope": self.slope(),
            "audit/spearman": self.spearman(),
        }

    def spearman(self) -> float:
        """Return the mean of the kept audits' rank correlations; an audit in which either side is constant counts 0."""
        correlations = [
            float(spearmanr(values, rewards).statistic) if len(set(values)) > 1 and len(set(rewards)) > 1 else 0.0
            for values, rewards in self.pairs
        ]
        return sum(correlations) / len(correlations)

    def slope(self) -> float:
        """Return the slope of the regression of reward on value over the kept audits; 1 is calibrated.

        Each audit's means are subtracted first, so that the fit does not follow the progress of the training.
        """
        covariance = spread = 0.0
        for value, reward in self.pairs:
            values, rewards = torch.tensor(value).double(), torch.tensor(reward).double()
            covariance += float(((values - values.mean()) * (rewards - rewards.mean())).sum())
            spread += float((values - values.mean()).square().sum())
        return covariance / spread if spread > 0 else 0.0

    def drift(self) -> str | None:
        """Describe how value and reward have come apart; None where they have not."""
        rewards = torch.tensor([reward for _, kept in self.pairs for reward in kept], dtype=torch.float64)
        correlation = self.spearman()
        if correlation < self.recipe.least_spearman:
            return (
                f"the value model's rank correlation with the true reward is {correlation:.2f} over {len(rewards)} "
                f"samples, below audit.least_spearman {self.recipe.least_spearman:g}"
            )
        slope, most = self.slope(), self.recipe.most_slope
        if not 1 / most <= slope <= most:
            return (
                f"the true reward changes {slope:.2f} times as much as the value over {len(rewards)} samples, "
                f"outside {1 / most:.2f} to {most:g} (audit.most_slope)"
            )
        bias = sum(sum(v) / len(v) - sum(r) / len(r) for v, r in self.pairs) / len(self.pairs)
        grown = (bias - sum(self.first_bias) / len(self.first_bias)) / max(float(rewards.std(correction=0)), 1e-8)
        if grown > self.recipe.most_bias:
            return (
                f"the mean value has risen {grown:.2f} standard deviations further above the mean true reward than in "
                f"the first audits, beyond audit.most_bias {self.recipe.most_bias:g}"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"pairs": list(self.pairs), "first_bias": list(self.first_bias)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pairs, self.first_bias = state["pairs"], state["first_bias"]


class Auditor:
    """Takes some of an epoch's stopped rollouts to the image and lets `audit` judge the value model by them."""

    def __init__(
        self,
        audit: Audit,
        *,
        generator: Generator,
        learner: Learner,
        scorer: Scorer,
        ranks: RankSync,
        prompts: list[str],
        rollout: RolloutRecipe,
        seed: int,
    ):
        self.audit, self.generator, self.learner, self.scorer = audit, generator, learner, scorer
        self.ranks, self.prompts, self.seed = ranks, prompts, seed
        self.sigmas, self.solver = generator.sigmas(rollout.steps), rollout.solver

    def check(self, epoch: int, rollouts: list[Rollout]) -> dict[str, float]:
        """Audit an epoch where its turn has come, on all processes together, and return the metrics.

        Raises SharedError when value and reward have come apart and audit.on_drift says stop.
        """
        recipe, samples = self.audit.recipe, self.learner.geometry.samples
        if recipe.every == 0 or epoch % recipe.every:
            return {}
        chosen = audited(samples, recipe.samples, self.seed, epoch)
        parts: tuple[list, list] = [], []
        with self.ranks.timings.phase("audit"):
            with self.ranks.together(), torch.no_grad():
                for rollout in rollouts:
                    self._add(rollout, chosen, parts)
            values, rewards = (self.ranks.gather(part, samples)[sorted(chosen)].cpu() for part in parts)
        check_finite("total", rewards)
        metrics = self.audit.add(values, rewards)
        if (drift := self.audit.drift()) is not None:
            message = f"audit in epoch {epoch + 1}: {drift}"
            if recipe.on_drift == "stop":
                raise SharedError(f"{message}; the run stops here (audit.on_drift)")
            if self.ranks.accelerator.is_main_process:
                tqdm.write(f"warning: {message}")
        return metrics

    def _add(self, rollout: Rollout, chosen: set[int], parts: tuple[list, list]) -> None:
        """Add the values and true rewards of a rollout's chosen samples to `parts`."""
        rows = [place for place, n in enumerate(rollout.samples) if n in chosen]
        if not rows:
            return
        with self.learner.policy.using("old"):
            latents = continue_rollout(
                self.generator, self.learner.sampler, rollout, rows, sigmas=self.sigmas, solver=self.solver
            )
        texts = [self.prompts[rollout.prompts[place]] for place in rows]
        rewards = self.scorer.score(self.generator.decode(latents), texts)["total"]
        values = rollout.rewards["total"][to_device(torch.tensor(rows), latents.device)]
        for part, scores in zip(parts, (values, rewards)):
            part.append(([rollout.samples[place] for place in rows], scores))
