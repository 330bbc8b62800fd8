"""The recipe's rewards and measures, loaded and applied by name: on images, and on noisy latents."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from nft.policy import Policy
from nft.rollout import Rollout
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.rewards import FunctionReward
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.runs.tracking import Timings
from stitchvm_reward.steering.build import pixel_reward
from stitchvm_reward.stitching.value_model import load_for, score_all


class Scorer:
    """Scores by every reward of a recipe and by their weighted sum, `total`; `metrics` are never trained on."""

    def __init__(self, rewards: list[RewardRecipe], metrics: list[str], device: torch.device):
        self.weights = {reward.name: reward.weight for reward in rewards}
        self.rewards = {reward.name: pixel_reward(reward, device) for reward in rewards}
        self.metrics = {name.rpartition(":")[2]: FunctionReward(name) for name in metrics}
        self.folders = {reward.name: reward.value_model for reward in rewards if reward.kind == "value"}
        self.device = device

    def load_values(self, generator: Generator, shared: bool = True) -> None:
        """Load the value models. Raises InputError.

        Those that are stitched to the generator's own blocks run on these where they may be `shared`.
        """
        self.values = load_for(self.folders, generator, shared)

    def compile_values(self) -> None:
        """Compile the value models' networks behind the blocks, each at its first call."""
        for model in self.values.values():
            model.network.compile()

    def _total(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        total = sum(self.weights[name] * values.to(self.device) for name, values in scores.items())
        return scores | {"total": torch.as_tensor(total)}

    def score(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Return (batch,) float32 per reward on images, and `total`, differentiable where the rewards are.

        The caller checks whether they are finite.
        """
        return self._total({name: reward.score(images, prompts) for name, reward in self.rewards.items()})

    def value(self, latents: Tensor, tau: Tensor, prompts: list[str], conditions: Conditions) -> dict[str, Tensor]:
        """Return (batch,) float32 per value model on latents at levels tau (batch,), and `total`; see `score`.

        `conditions` are those of the prompts, for value models whose backbone reads them. The caller must run the
        backbone's blocks without adapters.
        """
        return self._total(score_all(self.values, latents, tau, prompts, conditions))

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Return the rewards and, beside them, the measures that are never trained on."""
        return self.score(images, prompts) | {
            name: metric.score(images, prompts) for name, metric in self.metrics.items()
        }


@dataclass(frozen=True)
class RolloutScorer:
    """Rewards of rollouts, differentiable: of decoded images, or of noisy latents where rollouts stop early.

    `timings` times decoding and scoring, for which the device is waited for: None inside an optimizer step.
    """

    scorer: Scorer
    generator: Generator
    policy: Policy
    prompts: list[str]
    timings: Timings | None
    stopped: bool

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.timings is None else self.timings.phase(name)

    def __call__(self, rollout: Rollout) -> dict[str, Tensor]:
        texts = [self.prompts[prompt] for prompt in rollout.prompts]
        if self.stopped:
            with self._phase("score"), self.policy.using(None):
                return self.scorer.value(rollout.anchor, rollout.tau, texts, rollout.conditions)
        with self._phase("decode"):
            images = self.generator.decode(rollout.anchor)
        with self._phase("score"):
            return self.scorer.score(images, texts)
