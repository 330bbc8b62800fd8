"""Stage 2: finetune the stitching layer and the reward's last blocks on unlabelled images (section 4.1, D.1)."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from stitchvm_reward.diffusion.path import noised
from stitchvm_reward.errors import SharedError
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.rewards.aesthetic import AestheticHead
from stitchvm_reward.runs import checkpoint, randomness
from stitchvm_reward.runs.geometry import share
from stitchvm_reward.runs.gradients import FlatGradients
from stitchvm_reward.runs.rank_sync import RankSync, Stopped
from stitchvm_reward.runs.tracking import Tracker
from stitchvm_reward.stitching.config import StitchRecipe
from stitchvm_reward.stitching.teacher_cache import TeacherCache
from stitchvm_reward.stitching.value_model import StitchedValueModel


def clip_loss(
    states: Tensor, embedding: Tensor, target_states: Tensor, target_embedding: Tensor, weight: float
) -> Tensor:
    """Return ||e - e*||^2 + weight mean (h - h*)^2 per image, (batch,), for rewards that compare embeddings (D.1)."""
    tokens = (states - target_states).square().flatten(1).mean(1)
    return (embedding - target_embedding).square().sum(1) + weight * tokens


def aesthetic_loss(
    states: Tensor,
    embedding: Tensor,
    target_states: Tensor,
    target_embedding: Tensor,
    weight: float,
    *,
    head: AestheticHead,
) -> Tensor:
    """Return the smooth L1 loss on tokens, embedding and score per image, (batch,) (section D.1)."""
    tokens = F.smooth_l1_loss(states, target_states, reduction="none").flatten(1).mean(1)
    similar = F.smooth_l1_loss(embedding, target_embedding, reduction="none").mean(1)
    score = F.smooth_l1_loss(head(embedding), head(target_embedding), reduction="none")
    return weight * tokens + similar + score


def draw_sigma(count: int, generator: torch.Generator, mean: float, std: float) -> Tensor:
    """Draw noise levels in (0, 1) as the sigmoid of a normal deviate: dense in the middle."""
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator))


class Distiller:
    """Trains a value model's network to match cached targets, on all processes; resumes bit for bit.

    `order` holds positions among the targets, those excluded from fitting first. `conditions` returns what the
    backbone reads for some of these positions; it is None where the backbone reads the empty prompt.
    """

    def __init__(
        self,
        recipe: StitchRecipe,
        ranks: RankSync,
        model: StitchedValueModel,
        *,
        targets: TeacherCache,
        order: list[int],
        conditions: Callable[[list[int]], Conditions] | None = None,
    ):
        accelerator = ranks.accelerator
        self.recipe, self.ranks, self.accelerator, self.model = recipe, ranks, accelerator, model
        self.targets, self.conditions = targets, conditions
        self.main, tune = accelerator.is_main_process, recipe.finetune
        self.held_out, self.train_indices = order[: recipe.data.held_out], order[recipe.data.held_out :]
        self.steps_per_epoch = max(1, len(self.train_indices) // tune.batch)
        network = model.network.train().requires_grad_(True)
        groups = [
            {"params": list(network.stitch.parameters()), "lr": tune.learning_rate * tune.layer_factor},
            {"params": list(network.tail.parameters()), "lr": tune.learning_rate},
        ]
        self.network, self.parameters = network, list(network.parameters())
        self.optimizer = torch.optim.AdamW(groups, weight_decay=tune.weight_decay, fused=True)
        self.gradients = FlatGradients(self.parameters)
        if accelerator.num_processes > 1:
            for tensor in network.state_dict().values():  # each process has solved for the layer's start itself
                torch.distributed.broadcast(tensor, 0)
        name = "constant_with_warmup" if tune.schedule == "constant" else "cosine"
        self.scheduler = get_scheduler(
            name,
            self.optimizer,
            num_warmup_steps=tune.warmup,
            num_training_steps=self.steps_per_epoch * tune.epochs,
        )
        self.epoch = self.step = 0
        self.loss_sum = 0.0  # over the steps of the current epoch
        self.readout = model.readout

    def train(self, tracker: Tracker | None, folder: Path) -> None:
        """Run the remaining epochs and log one row of metrics per epoch; `tracker` is the main process's.

        Raises Stopped after a signal to any process, once a checkpoint of the current step is written.
        """
        try:
            self._train(tracker, folder)
        except Stopped:
            self.save(folder)
            total = self.steps_per_epoch * self.recipe.finetune.epochs
            raise Stopped(f"after step {self.step} of {total}") from None

    def _train(self, tracker: Tracker | None, folder: Path) -> None:
        recipe = self.recipe
        if self.step == 0 and tracker is not None:
            tracker.log(0, 0, self.measure())
        while self.epoch < recipe.finetune.epochs:
            metrics = self._epoch()
            last = self.epoch == recipe.finetune.epochs
            if tracker is not None and (last or self.epoch % recipe.evaluation.every == 0):
                metrics |= self.measure()
            if tracker is not None:
                tracker.log(self.epoch, self.step, metrics)
                shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith(("train", "spearman")))
                tqdm.write(f"epoch {self.epoch}/{recipe.finetune.epochs}  {shown}")
            if last or self.epoch % recipe.checkpoint.every == 0:
                self.save(folder)

    def _epoch(self) -> dict[str, float]:
        """Run the remaining steps of the current epoch and return its metrics."""
        recipe, tune = self.recipe, self.recipe.finetune
        shuffle = randomness.at(recipe.seed, randomness.ORDER, self.epoch)
        order = [self.train_indices[n] for n in torch.randperm(len(self.train_indices), generator=shuffle).tolist()]
        steps = range(self.step - self.epoch * self.steps_per_epoch, self.steps_per_epoch)
        bar = tqdm(steps, leave=False, disable=not self.main, dynamic_ncols=True)
        bar.set_description(f"epoch {self.epoch + 1} finetune")
        with self.ranks.timings.phase("finetune"):
            for step in bar:
                self.loss_sum += self._optimizer_step(order[step * tune.batch : (step + 1) * tune.batch])
                bar.set_postfix(loss=f"{self.loss_sum / (step + 1):.4f}")
                self.ranks.sync()
        mean = self.loss_sum / self.steps_per_epoch
        self.epoch, self.loss_sum = self.epoch + 1, 0.0
        return {"train/loss": mean, "train/learning_rate": self.scheduler.get_last_lr()[-1]}

    def _optimizer_step(self, indices: list[int]) -> float:
        """Make one step on these images over all processes and return their mean loss; gradients are reduced once."""
        tune, accelerator = self.recipe.finetune, self.accelerator
        micros = [indices[n : n + tune.micro_batch] for n in range(0, len(indices), tune.micro_batch)]
        local = share(len(micros), accelerator.process_index, accelerator.num_processes)
        total = torch.zeros(1, device=accelerator.device)
        for index in local:
            loss = self._loss(micros[index]).sum()
            (loss / len(indices)).backward()
            total += loss.detach()
        self.gradients.reduce()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, tune.max_gradient_norm)
        if not torch.isfinite(norm):
            raise SharedError(
                f"the gradient is not finite at step {self.step + 1}: the step was not applied; "
                "lower finetune.learning_rate and resume"
            )
        self.optimizer.step()
        self.scheduler.step()
        self.gradients.clear()
        self.step += 1
        return float(accelerator.reduce(total, "sum")) / len(indices)

    def _loss(self, indices: list[int]) -> Tensor:
        """Return the loss per image; each image has its own noise level and noise."""
        recipe, tune, device = self.recipe, self.recipe.finetune, self.accelerator.device
        latents, target_embedding, target_states = (value.to(device) for value in self.targets.read(indices))
        rows = [self.targets.rows[index] for index in indices]
        draws = [randomness.at(recipe.seed, randomness.TRAINING, self.epoch, row) for row in rows]
        sigma = torch.cat([draw_sigma(1, g, tune.sigma_mean, tune.sigma_std) for g in draws]).to(device)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in draws]).to(device)
        features = self.features(noised(latents, noise, sigma), sigma, indices)
        with torch.autocast(device.type, torch.bfloat16, enabled=tune.mixed_precision == "bf16"):
            states, embedding = self.network(features)
        pairs = states, embedding, target_states, target_embedding
        if isinstance(self.readout, AestheticHead):
            return aesthetic_loss(*pairs, tune.token_weight, head=self.readout)
        return clip_loss(*pairs, tune.token_weight)

    @torch.no_grad()
    def features(self, noisy: Tensor, sigma: Tensor, indices: list[int]) -> Tensor:
        """Return the frozen backbone's features, without gradient."""
        conditions = None if self.conditions is None else self.conditions(indices)
        return self.model.features(noisy, sigma, conditions)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Measure the model on the held-out images at each noise level.

        The metrics are the cosine with the target embedding and, for the aesthetic reward, Spearman's correlation of
        the scores.
        """
        from scipy.stats import spearmanr

        metrics: dict[str, float] = {}
        network = self.network.eval()
        size, device = self.recipe.finetune.micro_batch, self.accelerator.device
        for sigma in self.recipe.evaluation.sigmas:
            cosines, scores, target_scores = [], [], []
            for start in range(0, len(self.held_out), size):
                indices = self.held_out[start : start + size]
                latents, target = (v.to(device) for v in self.targets.read(indices, ("latents", "embedding")))
                rows = [self.targets.rows[index] for index in indices]
                noise = randomness.noise(latents.shape[1:], self.recipe.seed, randomness.EVALUATION, 0, rows).to(device)
                level = torch.full((len(indices),), sigma, device=device)
                _, embedding = network(self.features(noised(latents, noise, level), level, indices))
                cosines.append((embedding * target).sum(1).cpu())
                if isinstance(self.readout, AestheticHead):
                    scores.append(self.readout(embedding).cpu())
                    target_scores.append(self.readout(target).cpu())
            metrics[f"cosine/sigma_{sigma:g}"] = float(torch.cat(cosines).mean())
            if scores:
                correlation = spearmanr(torch.cat(scores), torch.cat(target_scores)).statistic
                metrics[f"spearman/sigma_{sigma:g}"] = float(correlation)
        network.train()
        return metrics

    def save(self, folder: Path) -> None:
        """Write a checkpoint of the network, the optimizer and the counters."""
        with self.ranks.together(), self.ranks.timings.phase("save"):
            if self.main:
                network = self.network
                tensors = {
                    "network": dict(network.state_dict()),
                    "optimizer": checkpoint.optimizer_tensors(self.optimizer),
                }
                state = {
                    "epoch": self.epoch,
                    "step": self.step,
                    "loss_sum": self.loss_sum,
                    "scheduler": self.scheduler.state_dict(),
                }
                checkpoint.save(folder / "checkpoints", self.epoch, tensors, state, self.recipe.checkpoint)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint folder."""
        tensors, state = checkpoint.load(path)
        self.network.load_state_dict(tensors["network"])
        checkpoint.load_optimizer(self.optimizer, tensors["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.epoch, self.step, self.loss_sum = state["epoch"], state["step"], state.get("loss_sum", 0.0)
