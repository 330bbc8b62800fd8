"""Flow-GRPO (arXiv 2505.05470): some solver steps are stochastic, and their likelihood is raised or lowered.

The stochastic steps lie in a short window near the noise, as in its fast variant; all other steps are Euler's.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nft.objectives.compared import Compared, ComparedSettings, check_groups, clipped_surrogate
from nft.objectives.objective import LossCall, Parts, SampleCost, Shapes, per_sample_mean, summed
from nft.rollout import Rollout, RolloutRecipe, sample
from stitchvm_reward.diffusion.path import per_sample
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.recipe import at_least, positive, require
from stitchvm_reward.transfer import to_device


@dataclass
class FlowGRPOSettings(ComparedSettings):
    sde_steps: int = 2
    """Stochastic solver steps of each rollout, one after the other: those that are trained on."""
    sde_within: int = 5
    """The stochastic steps lie within this many of a rollout's first steps; each group's place is drawn."""
    sde_noise: float = 0.7
    """Noise of the stochastic steps: a of sigma_t = a sqrt(t / (1 - t))."""
    sde_clip: float = 1.0e-4
    """Clip range of the likelihood ratio, PPO's epsilon. The logarithm of the ratio is a mean over the latent's
    numbers, so it is tiny."""

    def check(self) -> None:
        super().check()
        at_least("train.sde_steps", self.sde_steps, 1)
        at_least("train.sde_within", self.sde_within, 1)
        positive("train.sde_noise", self.sde_noise)
        positive("train.sde_clip", self.sde_clip)


@dataclass(frozen=True)
class Step:
    """A stochastic step of each sample: from level `t` to `following` < `t`, with `scale` the sigma_t of the SDE.

    All are (batch,) or broadcast over the latents. A scale of 0 makes it Euler's step.
    """

    t: Tensor
    following: Tensor
    scale: Tensor

    @property
    def std(self) -> Tensor:
        """The standard deviation of where the step ends."""
        return self.scale * (self.t - self.following).sqrt()

    def over(self, latents: Tensor) -> "Step":
        """Return the same step with values that broadcast over `latents`, (batch, ...)."""
        return Step(*(per_sample(values, latents) for values in (self.t, self.following, self.scale)))


def sde_scale(t: Tensor, noise: float | Tensor, largest: float) -> Tensor:
    """Return sigma_t = a sqrt(t / (1 - t)) of Flow-GRPO (arXiv 2505.05470, from ODE to SDE), with a = `noise`.

    It has no value at t = 1; `largest`, the solver's level after 1, stands in for t under the fraction there, as in the
    official code.
    """
    return noise * (t / (1 - t.clamp_max(largest))).sqrt()


def step_mean(latents: Tensor, velocity: Tensor, step: Step) -> Tensor:
    """Return where a step ends in the mean, float32 (batch, ...): Flow-GRPO's discretised SDE.

    z + (v + sigma_t^2 / (2 t) (z + (1 - t) v)) (s - t) for a step from t to s.
    """
    z, v, at = latents.float(), velocity.float(), step.over(latents)
    drift = v + at.scale.square() / (2 * at.t) * (z + (1 - at.t) * v)
    return z + drift * (at.following - at.t)


def log_probability(end: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log-density of N(mean, std^2) at `end`, averaged over the latent's numbers, (batch,) float32.

    `end` and `mean` are (batch, ...), `std` (batch,).
    """
    squares = per_sample_mean(((end - mean) / per_sample(std, end)).square())
    return -squares / 2 - std.log() - math.log(2 * math.pi) / 2


def kl_term(mean: Tensor, reference: Tensor, step: Step) -> Tensor:
    """Return the mean of (mean - mean_ref)^2 / (2 sigma_t^2), (batch,) float32.

    That is the KL divergence of the two Gaussians per number, times the length of the step t - s, as the official code
    computes it, so that its weights keep their meaning.
    """
    return per_sample_mean((mean - reference.detach()).square()) / (2 * step.scale.square())


def window_starts(seed: int, epoch: int, groups: list[int], within: int, steps: int) -> Tensor:
    """Draw the first stochastic step of each group, (groups,), such that all lie within the rollout's first ones.

    It is addressed by epoch and group, so every process draws the same.
    """
    generators = [randomness.at(seed, randomness.SDE_WINDOWS, epoch, group) for group in groups]
    return torch.cat([torch.randint(0, within - steps + 1, (1,), generator=generator) for generator in generators])


class FlowGRPO(Compared):
    """The rollout keeps its stochastic steps, and the update changes their likelihood by the advantage."""

    settings = FlowGRPOSettings
    method = "reinforcement by [Flow-GRPO](https://arxiv.org/abs/2505.05470)"
    terms: tuple[str, ...] = ("policy_loss", "kl", "clipped")

    def __init__(self, parts: Parts):
        super().__init__(parts)
        self.losses_per_sample = self.train.sde_steps

    @staticmethod
    def check(train: Any, rollout: RolloutRecipe) -> None:
        check_groups(rollout)
        require(rollout.solver == "euler", "train.objective=flow_grpo needs rollout.solver=euler", rollout.solver)
        require(
            train.old_schedule == 0,
            "train.objective=flow_grpo needs train.old_schedule=0: the current policy samples",
            train.old_schedule,
        )
        most = rollout.stop_window[0] if rollout.stop_window else rollout.steps
        require(
            train.sde_within <= most,
            f"train.sde_within must be at most the {most} solver steps that every rollout has",
            train.sde_within,
        )
        require(
            train.sde_steps <= train.sde_within,
            f"train.sde_steps must be at most train.sde_within ({train.sde_within})",
            train.sde_steps,
        )

    @staticmethod
    def cost(train: Any) -> SampleCost:
        return SampleCost(train.sde_steps, 1 if train.beta_kl > 0 else 0, kept=1 + train.sde_steps + 1)

    @staticmethod
    def describe(train: Any, rollout: RolloutRecipe, rounds: int) -> tuple[str, str]:
        return (
            f"{train.sde_steps} stochastic steps within the first {train.sde_within}, noise {train.sde_noise:g}, clip "
            f"{train.sde_clip:g}, beta_kl {train.beta_kl:g}",
            f"{rounds * train.sde_steps} forward and backward passes",
        )

    @staticmethod
    def training_pass(shapes: Shapes, batch: int) -> None:
        train, latents, conditions = shapes.recipe.train, shapes.latents(batch), shapes.conditions(batch)
        levels = latents.new_zeros(batch)
        step = Step(levels, levels, levels)
        mean = step_mean(latents, shapes.velocity(latents, conditions, "current"), step)
        current = log_probability(latents, mean, step.std)
        terms = [(1.0, clipped_surrogate((current - levels).exp(), levels, train.sde_clip))]
        if train.beta_kl > 0:
            with torch.no_grad():
                reference = step_mean(latents, shapes.velocity(latents, conditions, None), step)
            terms.append((train.beta_kl, kl_term(mean, reference, step)))
        summed(terms, 1.0)[0].backward()

    def starts(self, epoch: int, samples: list[int]) -> Tensor:
        """Return the first stochastic step of each sample, its group's draw, (batch,) on the CPU."""
        groups = [n // self.parts.rollout.group_size for n in samples]
        return window_starts(self.parts.seed, epoch, groups, self.train.sde_within, self.train.sde_steps)

    def step(self, places: Tensor, inside: Tensor, device: torch.device) -> Step:
        """Return the step from the solver's levels at `places` (batch,), stochastic where `inside`; both on the CPU."""
        sigmas = torch.tensor(self.sigmas)
        t, following = sigmas[places], sigmas[places + 1]
        scale = sde_scale(t, self.train.sde_noise, self.sigmas[1]) * inside
        return Step(*(to_device(values, device) for values in (t, following, scale)))

    @torch.no_grad()
    def roll_out(self, planned: Rollout, stops: list[int], epoch: int) -> Rollout:
        """Take the first `sde_within` steps of all samples, stochastic in each one's window, then Euler steps."""
        train, device, samples = self.train, planned.anchor.device, planned.samples
        starts, conditions, network = self.starts(epoch, samples), planned.conditions, self.learner.sampler
        latents, visited, taken = planned.anchor, [planned.anchor], []
        for place in range(train.sde_within):
            inside = (place >= starts) & (place < starts + train.sde_steps)
            step = self.step(torch.full_like(starts, place), inside, device)
            shape, seed = self.generator.latent_shape, self.parts.seed
            noise = to_device(randomness.noise(shape, seed, randomness.SDE, epoch, samples, place), device)
            velocity = self.generator.velocity(latents, step.t, conditions, network)
            mean = step_mean(latents, velocity, step)
            latents = mean + per_sample(step.std, mean) * noise
            visited.append(latents)
            # Steps outside the window have no density; theirs are left behind below.
            taken.append(log_probability(latents, mean, step.std))
        rows = torch.arange(len(samples), device=device)[:, None]
        window = to_device(starts[:, None] + torch.arange(train.sde_steps + 1), device)
        left, rest = [stop - train.sde_within for stop in stops], self.sigmas[train.sde_within :]
        return replace(
            planned,
            anchor=sample(self.generator, network, conditions, latents, rest, stops=left),
            tau=to_device(torch.tensor([self.sigmas[stop] for stop in stops]), device),
            taus=[self.sigmas[stop] for stop in stops],
            path=torch.stack(visited, 1)[rows, window],
            log_probs=torch.stack(taken, 1)[rows, window[:, :-1]],
        )

    def losses(self, rollout: Rollout, epoch: int) -> list[LossCall]:
        starts, rollout = self.starts(epoch, rollout.samples), rollout.gathered()
        self.ranks.sync()
        return [partial(self.loss, rollout, starts, index) for index in range(self.train.sde_steps)]

    def loss(self, rollout: Rollout, starts: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return the summed loss of one of each sample's stochastic steps, and the sums of its terms."""
        device, conditions, learner = rollout.anchor.device, rollout.conditions, self.learner
        step = self.step(starts + index, torch.ones_like(starts), device)
        if rollout.path is None or rollout.log_probs is None:  # a stand-in
            latents = end = rollout.anchor
        else:
            latents, end = rollout.path[:, index], rollout.path[:, index + 1]
        velocity = self.generator.velocity(latents, step.t, conditions, learner.network)
        mean = step_mean(latents, velocity, step)
        current = log_probability(end, mean, step.std)
        # While the policy is the one that sampled, the ratio is 1, whatever the two passes round.
        old = current.detach()
        if rollout.log_probs is not None and not learner.policy.old_is_current:
            old = rollout.log_probs[:, index]
        assert rollout.worth is not None
        ratio, clip = (current - old).exp(), self.train.sde_clip
        policy = clipped_surrogate(ratio, rollout.worth.to(ratio), clip)
        clipped = ((ratio.detach() - 1).abs() > clip).float()
        kl = torch.zeros_like(policy)
        if self.train.beta_kl > 0:
            reference = step_mean(latents, learner.frozen_velocity(None, latents, step.t, conditions), step)
            kl = kl_term(mean, reference, step)
        return summed([(1.0, policy), (self.train.beta_kl, kl), (0.0, clipped)], rollout.weight)
