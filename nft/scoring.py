"""The recipe's rewards and measures, loaded and applied by name: on images, and on noisy latents."""

import torch
from torch import Tensor

from nft.config import Recipe
from stitchvm_reward.diffusion.generator import Conditions, Generator
from stitchvm_reward.rewards import FunctionReward
from stitchvm_reward.steering.build import pixel_reward
from stitchvm_reward.stitching.value_model import load_for, score_all


class Scorer:
    """Scores by every reward of a recipe and by their weighted sum, `total`."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.weights = {reward.name: reward.weight for reward in recipe.rewards}
        self.rewards = {reward.name: pixel_reward(reward, device) for reward in recipe.rewards}
        self.metrics = {name.rpartition(":")[2]: FunctionReward(name) for name in recipe.evaluation.metrics}
        self.folders = {reward.name: reward.value_model for reward in recipe.rewards if reward.kind == "value"}
        self.device = device

    def load_values(self, generator: Generator, shared: bool = True) -> None:
        """Load the value models; where they are stitched to the generator's own blocks and these may be `shared`, on
        those. Raises InputError."""
        self.values = load_for(self.folders, generator, shared)

    def _total(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        total = sum(self.weights[name] * values.to(self.device) for name, values in scores.items())
        return scores | {"total": torch.as_tensor(total)}

    def score(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """(batch,) float32 per reward on images, and `total`, differentiable where the rewards are.

        Whether they are finite is for the caller to see.
        """
        return self._total({name: reward.score(images, prompts) for name, reward in self.rewards.items()})

    def value(self, latents: Tensor, tau: Tensor, prompts: list[str], conditions: Conditions) -> dict[str, Tensor]:
        """(batch,) float32 per value model on latents at levels tau (batch,), and `total`; as `score` otherwise.

        `conditions` are the prompts' embeddings, for value models whose backbone reads them. The backbone's blocks
        must be run without adapters: the caller sees to it.
        """
        return self._total(score_all(self.values, latents, tau, prompts, conditions))

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """The rewards and, beside them, the measures that are never trained on."""
        return self.score(images, prompts) | {
            name: metric.score(images, prompts) for name, metric in self.metrics.items()
        }
