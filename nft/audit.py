"""The audit of a value model: does its value still follow the true reward of what its latents become?"""

from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from nft.config import AuditRecipe
from stitchvm_reward.runs import randomness

KEPT = 3  # audits that are judged together: one alone is too few samples


def audited(samples: int, count: int, seed: int, epoch: int) -> set[int]:
    """Which of an epoch's samples are rolled on to the image, the same on every process."""
    order = torch.randperm(samples, generator=randomness.at(seed, randomness.AUDIT, epoch))
    return set(order[:count].tolist())


@dataclass
class Audit:
    """Pairs of value and true reward of the latest audits, and how far apart they were at first."""

    recipe: AuditRecipe
    pairs: list[list[list[float]]] = field(default_factory=list)
    first_bias: list[float] = field(default_factory=list)

    def add(self, values: Tensor, rewards: Tensor) -> dict[str, float]:
        """Take one audit's values and true rewards, (samples,) each; returns its figures.

        `bias` is the mean value less the mean reward, `slope` the regression of reward on value: 1 is calibrated.
        """
        values, rewards = values.double(), rewards.double()
        self.pairs = [*self.pairs, [values.tolist(), rewards.tolist()]][-KEPT:]
        bias = float(values.mean() - rewards.mean())
        if len(self.first_bias) < KEPT:
            self.first_bias.append(bias)
        spread = (values - values.mean()).square().sum()
        covariance = ((values - values.mean()) * (rewards - rewards.mean())).sum()
        return {
            "audit/value": float(values.mean()),
            "audit/reward": float(rewards.mean()),
            "audit/bias": bias,
            "audit/slope": float(covariance / spread) if spread > 0 else 0.0,
            "audit/spearman": self.spearman(),
        }

    def _pooled(self) -> tuple[Tensor, Tensor]:
        values, rewards = (torch.cat([torch.tensor(pair[side]).double() for pair in self.pairs]) for side in (0, 1))
        return values, rewards

    def spearman(self) -> float:
        """Rank correlation over the kept audits; 0 where either side does not vary."""
        values, rewards = self._pooled()
        if values.min() == values.max() or rewards.min() == rewards.max():
            return 0.0
        return float(spearmanr(values, rewards).statistic)

    def drift(self) -> str | None:
        """What has come apart, in words, or None."""
        _, rewards = self._pooled()
        found = self.spearman()
        if found < self.recipe.least_spearman:
            return (
                f"the value model's rank correlation with the true reward is {found:.2f} over {len(rewards)} samples, "
                f"below audit.least_spearman {self.recipe.least_spearman:g}"
            )
        bias = sum(sum(v) / len(v) - sum(r) / len(r) for v, r in self.pairs) / len(self.pairs)
        grown = (bias - sum(self.first_bias) / len(self.first_bias)) / max(float(rewards.std(correction=0)), 1e-8)
        if grown > self.recipe.most_bias:
            return (
                f"the mean value has risen {grown:.2f} standard deviations further above the mean true reward than at "
                f"first, beyond audit.most_bias {self.recipe.most_bias:g}"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "first_bias": self.first_bias}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pairs, self.first_bias = state["pairs"], state["first_bias"]
