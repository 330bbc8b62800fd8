"""The recipe's rewards and measures, loaded and applied by name."""

import torch
from torch import Tensor

from nft.config import Recipe
from stitchvm_reward.rewards import FunctionReward, check_finite, load_reward


class Scorer:
    """Scores images by every reward of a recipe and by their weighted sum, `total`."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.weights = {reward.name: reward.weight for reward in recipe.rewards}
        self.rewards = {
            reward.name: load_reward(reward.kind, reward.model, reward.head, reward.function, device)
            for reward in recipe.rewards
        }
        self.metrics = {name.rpartition(":")[2]: FunctionReward(name) for name in recipe.evaluation.metrics}

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """(batch,) float32 per reward, and `total`. Raises InputError naming a reward that is not finite."""
        scores = {name: reward.score(images, prompts) for name, reward in self.rewards.items()}
        for name, values in scores.items():
            check_finite(name, values)
        total = sum(self.weights[name] * values.to(images.device) for name, values in scores.items())
        return scores | {"total": torch.as_tensor(total)}

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """The rewards and, beside them, the measures that are never trained on."""
        return self.score(images, prompts) | {
            name: metric.score(images, prompts) for name, metric in self.metrics.items()
        }
