"""Values of noisy latents: from a stitched value model, from the denoised latent's image, or from rollouts."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from stitchvm_reward.diffusion.path import denoised
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards import Reward
from stitchvm_reward.runs import randomness
from stitchvm_reward.steering.denoiser import Denoiser, Known, Particles, join
from stitchvm_reward.stitching.value_model import StitchedValueModel, score_and_keep


class Value(ABC):
    """Scores latents in the layout of `Denoiser` at sigmas[step], one micro batch at a time."""

    name = "value"

    @abstractmethod
    def one(self, denoiser: Denoiser, latents: Tensor, rows: range, count: int, step: int) -> tuple[Tensor, Known]:
        """Return the values (batch,) float32 of one micro batch, `rows` of `count` latents, and what is then known."""

    @torch.no_grad()
    def measure(self, denoiser: Denoiser, latents: Tensor, step: int) -> tuple[Tensor, Known]:
        """Return the values (count,) float32 of latents (count, c, h, w), and what is known of their next pass."""
        count = len(latents)
        parts = [self.one(denoiser, latents[place], rows, count, step) for rows, place in denoiser.batches(count)]
        return torch.cat([values for values, _ in parts]), join([known for _, known in parts])

    def gradient(self, denoiser: Denoiser, latents: Tensor, step: int) -> tuple[Tensor, Tensor, Known]:
        """Return the values, their gradient in the latents (count, c, h, w) float32, and what is known, all detached.

        Raises InputError if the values are not differentiable.
        """
        parts: list[tuple[Tensor, Tensor, Known]] = []
        for rows, place in denoiser.batches(len(latents)):
            with torch.enable_grad():
                leaf = latents[place].detach().requires_grad_()
                values, known = self.one(denoiser, leaf, rows, len(latents), step)
                if not values.requires_grad:
                    raise InputError(f"dps needs a gradient, {self.name} gives none: it must be differentiable")
                values.sum().backward(inputs=[leaf])
            assert leaf.grad is not None
            parts.append((values.detach(), leaf.grad, known.detach()))
        values, slopes = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return values, slopes, join([known for _, _, known in parts])


class StitchedValue(Value):
    """V(z_t) as the weighted sum of stitched value models (Stitched Value Model, arXiv 2605.19804, C.2).

    If their backbone is the denoiser's own network, the blocks that they run begin its next forward pass.
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
    """The common estimate: rewards of the denoised latent's image. At level 0, these are the rewards themselves."""

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float]):
        self.rewards, self.weights, self.name = rewards, weights, " + ".join(rewards)

    def judge(self, denoiser: Denoiser, clean: Tensor, rows: range, count: int) -> Tensor:
        """Return the weighted sum of the rewards of clean latents, (batch,) float32."""
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
    """The mean reward of rollouts from the latent through all remaining levels: the quantity that V estimates.

    A rollout's own first step is of first order.
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float], rollouts: int):
        super().__init__(rewards, weights)
        self.rollouts = rollouts

    @torch.no_grad()
    def one(self, denoiser: Denoiser, latents: Tensor, rows: range, count: int, step: int) -> tuple[Tensor, Known]:
        if denoiser.sigmas[step] == 0:
            return super().one(denoiser, latents, rows, count, step)
        sigmas = denoiser.sigmas[step:]
        first = denoiser.guided(latents, sigmas[0], rows, count, Known())
        rewards = []
        for rollout in range(self.rollouts):
            noise = self._noise(denoiser, rows, count, (step, rollout), len(sigmas) - 1)
            current, velocity = Particles(latents), first
            for place, sigma in enumerate(sigmas[:-1]):
                if place:
                    velocity = denoiser.guided(current.latents, sigma, rows, count, Known())
                current = denoiser.move(current, velocity, noise[:, place], step + place)
            rewards.append(self.judge(denoiser, current.latents, rows, count))
        return torch.stack(rewards).mean(0), Known(velocity=first)

    @staticmethod
    def _noise(denoiser: Denoiser, rows: range, count: int, address: tuple[int, int], steps: int) -> Tensor:
        """Return noise (batch, steps, c, h, w); each particle has its own, at `address` (step, rollout)."""
        each, shape = count // len(denoiser.prompts), denoiser.generator.latent_shape
        drawn = [
            torch.randn(
                steps,
                *shape,
                generator=randomness.at(
                    denoiser.seed, randomness.MONTE_CARLO, denoiser.numbers[row // each], row % each, *address
                ),
            )
            for row in rows
        ]
        return torch.stack(drawn).to(denoiser.generator.device)
