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

        `bias` is the mean value less the mean reward, of this audit; `slope` and `spearman` are of all that are kept.
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
        """Mean of the kept audits' rank correlations; 0 for one in which either side does not vary."""
        found = [
            float(spearmanr(values, rewards).statistic) if len(set(values)) > 1 and len(set(rewards)) > 1 else 0.0
            for values, rewards in self.pairs
        ]
        return sum(found) / len(found)

    def slope(self) -> float:
        """Slope of the regression of reward on value over the kept audits, 1 where the value is calibrated; each
        audit's means are taken off first, so that it is not the training's progress that is fitted."""
        covariance = spread = 0.0
        for value, reward in self.pairs:
            values, rewards = torch.tensor(value).double(), torch.tensor(reward).double()
            covariance += float(((values - values.mean()) * (rewards - rewards.mean())).sum())
            spread += float((values - values.mean()).square().sum())
        return covariance / spread if spread > 0 else 0.0

    def drift(self) -> str | None:
        """What has come apart, in words, or None."""
        rewards = torch.tensor([reward for _, kept in self.pairs for reward in kept], dtype=torch.float64)
        found = self.spearman()
        if found < self.recipe.least_spearman:
            return (
                f"the value model's rank correlation with the true reward is {found:.2f} over {len(rewards)} samples, "
                f"below audit.least_spearman {self.recipe.least_spearman:g}"
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
                f"the mean value has risen {grown:.2f} standard deviations further above the mean true reward than at "
                f"first, beyond audit.most_bias {self.recipe.most_bias:g}"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"pairs": list(self.pairs), "first_bias": list(self.first_bias)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pairs, self.first_bias = state["pairs"], state["first_bias"]
