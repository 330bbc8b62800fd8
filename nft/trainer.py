"""The online loop: roll out, score, update, and look."""

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from nft.audit import Audit, audited
from nft.backend import Backend, zero_stage
from nft.config import Recipe
from nft.geometry import geometry_of
from nft.judge import judge
from nft.lockstep import LockStep
from nft.lora import lora_header, save_lora
from nft.models import load_generator, make_policy
from nft.plan import announce
from nft.prompts import check_prompts, epoch_prompts
from nft.rollout import Rollout, roll_on, roll_out, sample, stop_step
from nft.scoring import Scorer
from nft.state import Snapshot, Tensors, capture, counters, kept, restore
from nft.update import optimizer_step
from stitchvm_reward.diffusion.generator import PromptEmbeddings
from stitchvm_reward.diffusion.solvers import sigma_schedule
from stitchvm_reward.errors import SharedError
from stitchvm_reward.rewards import check_finite
from stitchvm_reward.runs import checkpoint, randomness
from stitchvm_reward.runs.agreement import Agreement, Stopped
from stitchvm_reward.runs.geometry import share
from stitchvm_reward.runs.run_folder import prepare_run_folder
from stitchvm_reward.runs.tracking import Tracker, before_after, curves

PHASES = ("rollout", "decode", "score", "audit", "train", "meet")  # what an epoch's time goes into


class Trainer:
    """One run of a recipe on the processes of `accelerator`; `train` runs it to its last epoch."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, agreement: Agreement | None = None):
        self.recipe, self.accelerator = recipe, accelerator
        self.agreement = agreement or Agreement(accelerator)
        self.main, self.timings = accelerator.is_main_process, self.agreement.timings
        rollout, train = recipe.rollout, recipe.train
        self.draft = train.objective == "draft"
        self.geometry = geometry_of(recipe, accelerator.num_processes)
        self.prompts, self.held_out = check_prompts(recipe)
        self.scorer = Scorer(recipe, accelerator.device)
        dtype = getattr(torch, recipe.model.dtype)
        with self.timings.phase("encode"):
            self.embeddings = self._encode(dtype)
        self.generator = load_generator(recipe, accelerator.device)
        # Blocks that ZeRO-3 shards cannot be run apart from the rest: value models have their own there.
        self.scorer.load_values(self.generator, shared=zero_stage(accelerator) < 3)
        self.audit = Audit(recipe.audit)
        self.sigmas = sigma_schedule(rollout.steps, self.generator.shift)
        self.policy = make_policy(recipe, self.generator)
        if recipe.model.compile:
            self.generator.compile_blocks()
        self.backend = Backend(accelerator, self.policy, train)
        self.network = self.sampler = self.backend.network
        if self.backend.stage == 3:
            self.sampler = LockStep(self.network, self.policy, self.generator)
            self.agreement.idle = self.sampler.idle
        # The scheduler counts optimizer steps, so it is not prepared: accelerate would step it once a process.
        self.scheduler = get_scheduler("constant_with_warmup", self.backend.optimizer, num_warmup_steps=train.warmup)
        self.cost = announce(recipe, accelerator.num_processes, tqdm.write) if self.main else {}
        # Nothing is written before everything has loaded: a failed start must not stand in a corrected one's way.
        self.folder = Path(recipe.out).expanduser()
        self.claim = self.agreement.together(lambda: prepare_run_folder(recipe) if self.main else None)
        self.epoch, self.step, self.skipped = 0, 0, 0
        self.writer = checkpoint.Writer()
        self.saved: int | None = None  # the epoch whose checkpoint was last given to it
        self.pending: dict[str, float] | None = None  # an epoch's figures while its evaluation has still to come
        self.optimality_now: Tensor | None = None
        self.before: tuple[Tensors | None, dict] | None = None  # what to go back to while an epoch is under way
        self.agreement.together(self._resume)
        first = self.epoch + (self.pending is None) if self.epoch else 0
        self.tracker = Tracker(self.folder, first) if self.main else None

    def _encode(self, dtype: torch.dtype) -> PromptEmbeddings:
        """Make sure every prompt's embedding is on disk; each process encodes its share."""
        model, prompts = self.recipe.model, self.recipe.prompts
        device = self.accelerator.device
        embeddings = PromptEmbeddings(model.path, prompts.cache, model.t5_length, dtype, device)

        def rounds(items) -> tqdm:
            return self._bar(self.agreement.rounds(items), "encode prompts", len(items))

        texts = list(dict.fromkeys([*self.prompts, *self.held_out]))
        own = share(len(texts), self.accelerator.process_index, self.accelerator.num_processes)
        self.agreement.together(lambda: embeddings.ensure(texts[own.start : own.stop], progress=rounds))
        return embeddings

    def _bar(self, items, phase: str, total: int | None = None) -> tqdm:
        return tqdm(items, desc=phase, total=total, leave=False, disable=not self.main, dynamic_ncols=True)

    def train(self) -> bool:
        """Run the remaining epochs; every figure of an epoch is one row of metrics.jsonl.

        Returns whether it came to the last one. A signal to any process ends it early, with a checkpoint.
        """
        try:
            every, last = self.recipe.evaluation.every, self.recipe.epochs
            if self.epoch == 0:
                self._log(self.evaluate(0))
            while self.pending is not None or self.epoch < last:
                if self.pending is None:
                    self.pending = self.run_epoch()
                if self.epoch == last or (every and self.epoch % every == 0):
                    self.pending |= self.evaluate(self.epoch)
                self._log(self.pending)
                self.pending = None
                if self.epoch == last or self.epoch % self.recipe.checkpoint.every == 0:
                    self._save(capture(self))
            self.agreement.together(self.writer.wait)
            self.agreement.together(self._finish)
        except Stopped:
            self._stop()
            return False
        finally:
            self.writer.wait()
        return True

    def run_epoch(self) -> dict[str, float]:
        """One round of rollout and update; until its end, `before` is what a run that is stopped goes back to."""
        # Where the one step of an epoch is its last act, the tensors stay as they are until then and need no copy.
        last = self.geometry.updates == 1 and not (self.draft and self.recipe.audit.every)
        self.before = (None, counters(self)) if last else capture(self, copy=True)
        rollouts = self.collect(self.epoch)
        # The rewards that are back-propagated are known only then.
        metrics = self.cost | (self.update(self.epoch, rollouts) if self.draft else {})
        metrics |= judge(self, rollouts)
        skipped = "train/skipped" in metrics
        if not skipped:
            metrics |= self.check_values(self.epoch, rollouts)
            if not self.draft:
                metrics |= self.update(self.epoch, rollouts)
        if self.draft or not skipped:
            self.policy.after_epoch(self.recipe.train.old_schedule, self.step)
        self.epoch += 1
        self.before = None
        return metrics

    def _stop(self) -> None:
        """Save what a signal interrupted: the epoch under way is begun again, its evaluation is still to come."""
        if self.pending is not None:
            self.pending |= self.timings.take()
        tensors, state = self.before or (None, counters(self))
        epoch = state["epoch"]
        if epoch != self.saved:
            self._save((tensors or capture(self)[0], state))
        self.agreement.together(self.writer.wait)
        if self.main:
            tqdm.write(f"stopped by a signal after epoch {epoch} of {self.recipe.epochs}; run it again to go on")

    def collect(self, epoch: int) -> list[Rollout]:
        """This process's rollouts of an epoch by the old policy, scored.

        Those of draft end train.draft_steps steps early: the update takes these and scores.
        """
        chosen = epoch_prompts(len(self.prompts), self.geometry.groups, self.recipe.seed, epoch)
        steps = [sum(self._taken(epoch, self.geometry.members(batch))) for batch in range(self.geometry.batches)]
        own = self.geometry.deal(steps)[self.accelerator.process_index]
        ours = sorted({chosen[n // self.geometry.group_size] for batch in own for n in self.geometry.members(batch)})
        table = self.embeddings.conditions([self.prompts[prompt] for prompt in ours or [0]])

        def one(batch: int) -> Rollout:
            samples = self.geometry.members(batch)
            prompts = [chosen[n // self.geometry.group_size] for n in samples]
            rows = torch.tensor([ours.index(prompt) for prompt in prompts], device=self.accelerator.device)
            with self.timings.phase("rollout"), self.policy.using("old"):
                rollout = roll_out(
                    self.generator,
                    self.sampler,
                    table,
                    rows,
                    samples,
                    prompts,
                    self.recipe.seed,
                    epoch,
                    self.sigmas,
                    self.recipe.rollout.solver,
                    self._taken(epoch, samples),
                )
            if not self.draft:
                with torch.no_grad():
                    rollout.rewards = self.score(rollout)
            return rollout

        rollouts, total, count = [], 0.0, 0
        made = self.agreement.rounds(own, one)
        for rollout in (bar := self._bar(made, f"epoch {epoch + 1} rollout", len(own))):
            rollouts.append(rollout)
            if not self.draft:
                total, count = total + float(rollout.rewards["total"].sum()), count + len(rollout.samples)
                bar.set_postfix(reward=f"{total / count:.3f}")
        return rollouts

    def stops(self, epoch: int, samples: list[int]) -> list[int]:
        """After how many solver steps each sample's rollout ends: all of them, or its group's draw."""
        rollout = self.recipe.rollout
        if not rollout.stop_window:
            return [rollout.steps] * len(samples)
        groups = [n // rollout.group_size for n in samples]
        return [stop_step(self.recipe.seed, epoch, group, rollout.stop_window) for group in groups]

    def _taken(self, epoch: int, samples: list[int]) -> list[int]:
        """How many of these steps the rollout takes."""
        left = self.recipe.train.draft_steps if self.draft else 0
        return [stop - left for stop in self.stops(epoch, samples)]

    def score(self, rollout: Rollout) -> dict[str, Tensor]:
        """Rewards by name, differentiable: of decoded images, or of the noisy latents where rollouts stop early."""
        texts = [self.prompts[prompt] for prompt in rollout.prompts]
        if self.recipe.rollout.stop_window:
            with self.timings.phase("score"), self.policy.using(None):
                return self.scorer.value(rollout.anchor, rollout.tau, texts, rollout.conditions)
        with self.timings.phase("decode"):
            images = self.generator.decode(rollout.anchor)
        with self.timings.phase("score"):
            return self.scorer.score(images, texts)

    def check_values(self, epoch: int, rollouts: list[Rollout]) -> dict[str, float]:
        """Roll some stopped samples on to the image and compare their values with the true rewards there.

        Raises SharedError when the two have come apart and audit.on_drift says stop.
        """
        recipe = self.recipe.audit
        if recipe.every == 0 or epoch % recipe.every:
            return {}
        chosen, solver = (
            audited(self.geometry.samples, recipe.samples, self.recipe.seed, epoch),
            self.recipe.rollout.solver,
        )
        parts: tuple[list, list] = [], []

        @torch.no_grad()
        def roll_all_on() -> None:
            for rollout in rollouts:
                rows = [place for place, n in enumerate(rollout.samples) if n in chosen]
                if not rows:
                    continue
                with self.policy.using("old"):
                    latents = roll_on(self.generator, self.sampler, rollout, rows, self.sigmas, solver)
                texts = [self.prompts[rollout.prompts[place]] for place in rows]
                rewards = self.scorer.score(self.generator.decode(latents), texts)["total"]
                for part, scores in zip(parts, (rollout.rewards["total"][rows], rewards)):
                    part.append(([rollout.samples[place] for place in rows], scores))

        with self.timings.phase("audit"):
            self.agreement.together(roll_all_on)
            values, rewards = (
                self.agreement.gather(part, self.geometry.samples)[sorted(chosen)].cpu() for part in parts
            )
        check_finite("total", rewards)
        figures = self.audit.add(values, rewards)
        if (drift := self.audit.drift()) is not None:
            told = f"audit in epoch {epoch + 1}: {drift}"
            if recipe.on_drift == "stop":
                raise SharedError(f"{told}; the run stops here (audit.on_drift)")
            if self.main:
                tqdm.write(f"warning: {told}")
        return figures

    def update(self, epoch: int, rollouts: list[Rollout]) -> dict[str, float]:
        """The epoch's optimizer steps; returns their mean loss terms and gradient norm."""
        by_batch = {rollout.samples[0] // self.geometry.micro_batch: rollout for rollout in rollouts}
        sums, updates = torch.zeros(4, device=self.accelerator.device), range(self.geometry.updates)
        rounds = sum(self.geometry.rounds(update) for update in updates)
        with self.timings.phase("train"), self._bar(None, f"epoch {epoch + 1} train", rounds) as bar:
            for update in updates:
                batches = [by_batch[batch] for batch in self.geometry.trained_in(update, by_batch)]
                sums += optimizer_step(self, epoch, update, batches, bar)
        policy, kl, deviation, norm = (sums / self.geometry.updates).tolist()
        return {
            "train/policy_loss": policy,
            "train/kl": kl,
            **({} if self.draft else {"train/old_deviation": deviation}),
            "train/gradient_norm": norm,
            "train/learning_rate": self.scheduler.get_last_lr()[0],
        }

    def skip(self, told: str) -> None:
        """Count a step that is left out, or raise SharedError, as the recipe says; all processes come here alike."""
        train = self.recipe.train
        self.skipped += 1
        if train.on_nonfinite == "raise":
            raise SharedError(f"{told}: nothing was applied; mend it or set train.on_nonfinite=skip, and resume")
        if self.skipped > train.most_skips:
            raise SharedError(
                f"{told}: more than {train.most_skips} steps in a row (train.most_skips); nothing was applied"
            )
        if self.main:
            tqdm.write(f"warning: {told}: this step is left out")

    @torch.no_grad()
    def images(self, adapter: str | None, indices: list[int]) -> Tensor:
        """Held-out images of one adapter, always from the same noise."""
        conditions = self.embeddings.conditions([self.held_out[n] for n in indices])
        noise = randomness.noise(self.generator.latent_shape, self.recipe.seed, randomness.EVALUATION, 0, indices)
        sigmas = sigma_schedule(self.recipe.evaluation.steps, self.generator.shift)
        with self.policy.using(adapter):
            latents = sample(self.generator, self.sampler, conditions, noise, sigmas, "euler")
        return self.generator.decode(latents)

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Held-out rewards and measures of the averaged policy, over all processes."""
        count, size = len(self.held_out), self.recipe.rollout.micro_batch
        own = share(count, self.accelerator.process_index, self.accelerator.num_processes)
        found: dict[str, list[tuple[list[int], Tensor]]] = {}
        shown = []

        def look(start: int) -> None:
            indices = list(range(start, min(start + size, own.stop)))
            images = self.images("ema", indices)
            for name, values in self.scorer.measure(images, [self.held_out[n] for n in indices]).items():
                found.setdefault(name, []).append((indices, values))
            kept = [n for n in indices if n < self.recipe.evaluation.grid]
            if kept:
                shown.append((kept, images[: len(kept)]))

        with self.timings.phase("evaluate"):
            starts = range(own.start, own.stop, size)
            for _ in self._bar(self.agreement.rounds(starts, look), f"epoch {epoch} evaluate", len(starts)):
                pass
            metrics = {}
            for name in [*self.scorer.rewards, "total", *self.scorer.metrics]:
                values = self.agreement.gather(found.get(name, []), count)
                if name not in self.scorer.metrics:
                    check_finite(name, values)
                metrics[f"held_out/{name}"] = float(values.mean())
                metrics[f"held_out/{name}_std"] = float(values.std())
            side = self.generator.resolution
            blank = [([0], torch.zeros(1, 3, side, side))] if not shown else shown
            pictures = self.agreement.gather(blank, self.recipe.evaluation.grid)
        if self.main and self.tracker is not None:
            self.tracker.images(epoch, pictures)
        return metrics

    def _log(self, metrics: dict[str, float]) -> None:
        metrics |= self.timings.take()
        seconds = sum(metrics.get(f"seconds/{phase}", 0.0) for phase in PHASES)
        if seconds:
            metrics["images_per_second"] = self.geometry.samples / seconds
        if self.tracker is not None:
            self.tracker.log(self.epoch, self.step, metrics, self.optimality_now)
            shown = {k: v for k, v in metrics.items() if k in ("reward/total", "held_out/total", "train/old_deviation")}
            tqdm.write(
                f"epoch {self.epoch}/{self.recipe.epochs}  "
                + "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
                + f"  {seconds:.1f} s"
            )

    def _save(self, snapshot: Snapshot) -> None:
        (tensors, state), folder = snapshot, self.folder / "checkpoints"

        def write() -> None:
            if self.main:
                with self.timings.phase("save"):
                    self.writer.submit(folder, state["epoch"], kept(tensors), state, self.recipe.checkpoint)

        self.saved = state["epoch"]
        self.agreement.together(write)

    def _resume(self) -> None:
        warn = tqdm.write if self.main else lambda _: None
        path = checkpoint.choose(self.folder / "checkpoints", self.recipe.checkpoint.resume, warn)
        if path is not None:
            restore(self, *checkpoint.load(path))
            if self.main:
                tqdm.write(f"resumed from {path}")

    def _finish(self) -> None:
        """Leave what people look at: the averaged adapter as a LoRA file, pictures before and after, curves."""
        averaged = self.policy.whole("ema")
        if self.tracker is None:
            return
        indices = list(range(self.recipe.evaluation.grid))
        before, after = (torch.cat([self.images(a, [n]).cpu() for n in indices]) for a in (None, "ema"))
        before_after(before, after, [self.held_out[n] for n in indices], self.folder / "before_after.png")
        header = lora_header(self.recipe, self.generator.transformer.config, self.epoch)
        save_lora(self.folder / "lora.safetensors", averaged, self.policy.scaling(), header)
        self.tracker.close()
        curves(self.folder)
