"""What a noisy latent is worth: by a stitched value model, by the image of the denoised latent, or by rollouts."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from stitchvm_reward.diffusion.path import denoised
from stitchvm_reward.diffusion.solvers import sde_step
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards import Reward
from stitchvm_reward.runs import randomness
from stitchvm_reward.steering.denoiser import Denoiser, Known, join
from stitchvm_reward.stitching.value_model import StitchedValueModel, score_and_keep


class Value(ABC):
    """Scores latents of `Denoiser`'s layout at sigmas[step], by `one` micro batch after the other."""

    name = "value"

    @abstractmethod
    def one(self, denoiser: Denoiser, latents: Tensor, rows: range, count: int, step: int) -> tuple[Tensor, Known]:
        """Values (batch,) float32 of one micro batch, the `rows` of `count` latents, and what they make known."""

    @torch.no_grad()
    def measure(self, denoiser: Denoiser, latents: Tensor, step: int) -> tuple[Tensor, Known]:
        """Values (count,) float32 of (count, c, h, w) latents, and what is known of their next forward pass."""
        count = len(latents)
        parts = [self.one(denoiser, latents[place], rows, count, step) for rows, place in denoiser.batches(count)]
        return torch.cat([values for values, _ in parts]), join([known for _, known in parts])

    def gradient(self, denoiser: Denoiser, latents: Tensor, step: int) -> tuple[Tensor, Tensor, Known]:
        """Values, their gradient in the latents (count, c, h, w) float32, and what is known, without a graph.

        Raises InputError where the values have none.
        """
        parts: list[tuple[Tensor, Tensor, Known]] = []
        for rows, place in denoiser.batches(len(latents)):
            with torch.enable_grad():
                own = latents[place].detach().requires_grad_()
                values, known = self.one(denoiser, own, rows, len(latents), step)
                if not values.requires_grad:
                    raise InputError(f"dps needs a gradient, {self.name} gives none: it must be differentiable")
                values.sum().backward(inputs=[own])
            assert own.grad is not None
            parts.append((values.detach(), own.grad, known.detach()))
        values, slopes = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return values, slopes, join([known for _, _, known in parts])


class StitchedValue(Value):
    """V(z_t) of one or several stitched value models: their weighted sum (Stitched Value Model, arXiv 2605.19804, C.2).

    Where their backbone is the denoiser's own network, the blocks that they run begin its next forward pass.
    """

    def __init__(self, models: dict[str, StitchedValueModel], weights: dict[str, float]):
        self.models, self.weights, self.name = models, weights, " + ".join(models)
        self.reads_prompts = any(model.conditioning == "prompt" for model in models.values())

    def one(self, denoiser: Denoiser, latents: Tensor, rows: range, count: int, step: int) -> tuple[Tensor, Known]:
        scores, passes = score_and_keep(
            self.models,
            latents,
            denoiser.sigmas[step],
            denoiser.texts(rows, count),
            denoiser.conditions_of(rows, count) if self.reads_prompts else None,
        )
        total = torch.stack([self.weights[name] * values for name, values in scores.items()]).sum(0)
        return total, Known(passes=denoiser.usable(passes))


class TweedieValue(Value):
    """Rewards of the image of the denoised latent: the ordinary estimate. At level 0 the rewards themselves."""

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float]):
        self.rewards, self.weights, self.name = rewards, weights, " + ".join(rewards)

    def judge(self, denoiser: Denoiser, clean: Tensor, rows: range, count: int) -> Tensor:
        """The weighted sum of the rewards (batch,) float32 of clean latents."""
        images, texts = denoiser.generator.decode(clean), denoiser.texts(rows, count)
        scores = [self.weights[name] * reward.score(images, texts) for name, reward in self.rewards.items()]
        return torch.stack([score.to(clean.device) for score in scores]).sum(0)

    def one(self, denoiser: Denoiser, latents: Tensor, rows: range, count: int, step: int) -> tuple[Tensor, Known]:
        sigma = denoiser.sigmas[step]
        if sigma == 0:
            return self.judge(denoiser, latents, rows, count), Known()
        velocity = denoiser.guided(latents, sigma, rows, count, Known())
        clean = denoised(latents, velocity, torch.tensor(sigma))
        return self.judge(denoiser, clean, rows, count), Known(velocity=velocity)


class MonteCarloValue(TweedieValue):
    """The mean reward of rollouts from the latent on, through all levels that are left: what V stands for."""

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float], rollouts: int):
        super().__init__(rewards, weights)
        self.rollouts = rollouts

    @torch.no_grad()
    def one(self, denoiser: Denoiser, latents: Tensor, rows: range, count: int, step: int) -> tuple[Tensor, Known]:
        if denoiser.sigmas[step] == 0:
            return super().one(denoiser, latents, rows, count, step)
        sigmas = denoiser.sigmas[step:]
        first = denoiser.guided(latents, sigmas[0], rows, count, Known())
        found = []
        for rollout in range(self.rollouts):
            noise = self._noise(denoiser, rows, count, step, rollout, len(sigmas) - 1)
            own, velocity = latents, first
            for place, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
                if place:
                    velocity = denoiser.guided(own, sigma, rows, count, Known())
                clean = denoised(own, velocity, torch.tensor(sigma))
                own = sde_step(own, clean, noise[:, place], sigma, following, denoiser.stochasticity)
            found.append(self.judge(denoiser, own, rows, count))
        return torch.stack(found).mean(0), Known(velocity=first)

    @staticmethod
    def _noise(denoiser: Denoiser, rows: range, count: int, step: int, rollout: int, steps: int) -> Tensor:
        """(batch, steps, c, h, w), each particle's own."""
        each, shape = count // len(denoiser.prompts), denoiser.generator.latent_shape
        drawn = [
            torch.randn(
                steps,
                *shape,
                generator=randomness.at(
                    denoiser.seed, randomness.MONTE_CARLO, denoiser.numbers[row // each], row % each, step, rollout
                ),
            )
            for row in rows
        ]
        return torch.stack(drawn).to(denoiser.generator.device)
