"""Everything that an optimizer step needs: the network with its adapters, the optimizer, its schedule and counters."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from nft.backend import Backend
from nft.geometry import Geometry
from nft.optimization import OptimizationSettings
from nft.policy import Policy
from nft.rollout import Rollout
from nft.zero_forward import ZeroForward
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.errors import SharedError
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.runs import checkpoint
from stitchvm_reward.runs.rank_sync import RankSync

Tensors = dict[str, dict[str, Tensor]]


class Losses(Protocol):
    """What an optimizer step asks of an objective; see nft.objectives.objective.Objective."""

    losses_per_sample: int

    @property
    def terms(self) -> tuple[str, ...]: ...

    def losses(self, rollout: Rollout, epoch: int) -> list[Callable[[], tuple[Tensor, Tensor]]]: ...

    def progress(self, rollout: Rollout) -> dict[str, str]: ...

    def problem(self) -> str | None: ...


class Learner:
    """Trains the adapters of `policy` on the processes of `ranks`.

    `network` is what to call in training and `sampler` outside of it. `stand_in` is a rollout of weight zero that keeps
    processes with fewer micro batches in step.
    """

    def __init__(
        self,
        settings: OptimizationSettings,
        policy: Policy,
        *,
        generator: Generator,
        ranks: RankSync,
        geometry: Geometry,
        stand_in: Rollout,
    ):
        self.settings, self.policy, self.generator, self.ranks = settings, policy, generator, ranks
        self.geometry, self.stand_in = geometry, stand_in
        self.backend = Backend(ranks.accelerator, policy, settings)
        self.network = self.sampler = self.backend.network
        if self.backend.stage == 3:
            self.sampler = ZeroForward(self.network, policy, generator, stand_in.conditions)
            ranks.idle = self.sampler.idle
        # The scheduler counts optimizer steps, so it is not prepared: accelerate would step it once per process.
        self.scheduler = get_scheduler("constant_with_warmup", self.backend.optimizer, num_warmup_steps=settings.warmup)
        self.step = self.skipped = 0

    @torch.no_grad()
    def frozen_velocity(self, adapter: str | None, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Return the velocity of one adapter, or of the base model, without gradient."""
        with self.policy.using(adapter):
            return self.generator.velocity(latents, t, conditions, self.network)

    def update(self, rollouts: list[Rollout], epoch: int, objective: Losses) -> dict[str, float]:
        """Take an epoch's optimizer steps and return the means of the loss terms and of the gradient norm."""
        ordered = sorted(rollouts, key=lambda rollout: rollout.samples[0])
        sums = torch.zeros(len(objective.terms) + 1, device=self.ranks.accelerator.device)
        updates = range(self.geometry.updates)
        rounds = sum(self.geometry.rounds(update) for update in updates)
        main = self.ranks.accelerator.is_main_process
        bar = tqdm(desc=f"epoch {epoch + 1} train", total=rounds, leave=False, disable=not main, dynamic_ncols=True)
        with self.ranks.timings.phase("train"), bar:
            for update in updates:
                batches = [rollout for rollout in ordered if rollout.samples[0] in self.geometry.share(update)]
                sums += self._optimizer_step(batches, epoch, update, objective, bar)
        *terms, norm = (sums / self.geometry.updates).tolist()
        return {
            **{f"train/{name}": value for name, value in zip(objective.terms, terms, strict=True)},
            "train/gradient_norm": norm,
            "train/learning_rate": self.scheduler.get_last_lr()[0],
        }

    def _optimizer_step(self, batches: list[Rollout], epoch: int, update: int, objective: Losses, bar: tqdm) -> Tensor:
        """Take one step: the mean over all processes' samples and levels, with gradients reduced once.

        Returns the means of the loss terms and the gradient norm.
        """
        rounds, accelerator = self.geometry.rounds(update), self.ranks.accelerator
        count = len(self.geometry.share(update)) * objective.losses_per_sample
        sums = torch.zeros(len(objective.terms) + 1, device=accelerator.device)
        with self.backend.accumulating():
            for index in range(rounds):
                rollout = batches[index] if index < len(batches) else self.stand_in
                losses = objective.losses(rollout, epoch)
                for compute in losses:
                    loss, parts = compute()
                    self.backend.backward(loss / count)
                    sums[:-1] += parts
                bar.update()
                if not bar.disable:
                    bar.set_postfix(objective.progress(rollout), refresh=False)
        problem = objective.problem()
        norm = None
        if problem is None:
            norm = self.backend.step()
        else:
            self.backend.discard()
        if norm is None:
            reason = f"{problem} in" if problem else "the gradient is not finite in"
            self.skip(f"{reason} epoch {epoch + 1}, update {update + 1} (a high train.learning_rate?)")
            return torch.zeros_like(sums)
        self.skipped = 0
        self.scheduler.step()
        self.step += 1
        self.policy.after_update(self.step, self.settings.ema_decay)
        reduced = accelerator.reduce(sums, "sum") / count
        reduced[-1] = norm
        return reduced

    def skip(self, message: str) -> None:
        """Count a step that is left out, or raise SharedError, as the recipe says; all processes call this alike."""
        self.skipped += 1
        if self.settings.on_nonfinite == "raise":
            raise SharedError(
                f"{message}: nothing was applied; correct the cause or set train.on_nonfinite=skip, and resume"
            )
        if self.skipped > self.settings.most_skips:
            raise SharedError(
                f"{message}: more than {self.settings.most_skips} steps in a row (train.most_skips): nothing was "
                "applied"
            )
        if self.ranks.accelerator.is_main_process:
            tqdm.write(f"warning: {message}: this step is left out")

    def tensors(self) -> Tensors:
        """Return all adapters and the optimizer's moments as they are now; all processes call this together."""
        return {"adapters": self.policy.state_dict(), "optimizer": self.backend.optimizer_tensors()}

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and the schedule."""
        return {
            "step": self.step,
            "skipped": self.skipped,
            "old_is_current": self.policy.old_is_current,
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], tensors: Tensors) -> None:
        """Restore what `state_dict` and `tensors` returned.

        Raises InputError for the state of another version of this code, and for adapters or moments that do not fit.
        """
        checkpoint.require_keys(state, self.state_dict())
        self.policy.load_state_dict(tensors["adapters"])
        self.policy.old_is_current = state["old_is_current"]
        self.backend.load(tensors["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        # A scheduler sets its rate only when it steps; until then the groups would hold a fresh run's rate.
        for group, rate in zip(self.backend.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.step, self.skipped = state["step"], state["skipped"]


def on_cpu(tensors: Tensors) -> Tensors:
    """Return copies of the tensors in the CPU's memory, which later steps do not change."""
    return {file: {key: t.detach().to("cpu", copy=True) for key, t in part.items()} for file, part in tensors.items()}
