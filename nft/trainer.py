"""The online loop: roll out, score, update, and look."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from nft.audit import Audit, Auditor
from nft.backend import zero_stage
from nft.collector import Collector
from nft.compilation import compilation
from nft.config import Recipe
from nft.cost.micro_batch import fit_devices
from nft.cost.plan import announce, recipe_geometry
from nft.export.lora import lora_header, save_lora
from nft.held_out import HeldOut, held_out_metrics
from nft.inputs import input_digests, require_unchanged
from nft.learner import Learner, Tensors, on_cpu
from nft.models import load_generator, make_policy
from nft.objectives import objective_class
from nft.objectives.objective import Learned, Parts
from nft.prompts import DrawnPrompts, check_prompts
from nft.rollout import stand_in
from nft.scoring import RolloutScorer, Scorer
from nft.sharded import load_sharded
from nft.untrained import UntrainedLatents
from nft.value_models import build_missing
from stitchvm_reward.errors import InputError
from stitchvm_reward.files import null_as_nan
from stitchvm_reward.measure import compiled_graphs
from stitchvm_reward.runs import checkpoint
from stitchvm_reward.runs.pictures import before_after, curves
from stitchvm_reward.runs.rank_sync import RankSync, Stopped, mark_stopped
from stitchvm_reward.runs.run_folder import prepare_run_folder, write_recipe
from stitchvm_reward.runs.tracking import Tracker, epoch_line, epoch_seconds


class Trainer:
    """One run of a recipe on the processes of `accelerator`; `train` runs it to its last epoch."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, ranks: RankSync | None = None):
        self.recipe, self.ranks = recipe, ranks or RankSync(accelerator)
        self.main, self.timings = accelerator.is_main_process, self.ranks.timings
        prompts, all_held_out = check_prompts(recipe)
        held_out = all_held_out[: recipe.evaluation.samples]
        build_missing(recipe, self.ranks, tqdm.write)
        self.inputs = input_digests(recipe, prompts, all_held_out)
        fitted = fit_devices(recipe, self.ranks)
        rollout, train, seed = fitted.rollout, fitted.train, recipe.seed
        scorer = Scorer(recipe.rewards, recipe.evaluation.metrics, accelerator.device)
        self.folder = Path(recipe.out).expanduser()
        first = checkpoint.expected_epoch(self.folder / "checkpoints", recipe.checkpoint.resume)
        self.prompts = DrawnPrompts(recipe, prompts, held_out, first=first, ranks=self.ranks)
        self.cache = self.prompts.cache
        sharded = load_sharded(recipe.model, accelerator) if zero_stage(accelerator) == 3 else None
        generator = load_generator(recipe, accelerator.device, sharded)
        # Blocks that ZeRO-3 shards cannot run apart from the rest: value models load their own.
        scorer.load_values(generator, shared=zero_stage(accelerator) < 3)
        policy = make_policy(recipe, generator)
        self.compiled = compilation(recipe.model, accelerator.device, zero_stage(accelerator))
        if self.compiled.on:
            generator.compile_blocks()
            scorer.compile_values()
        self.learner = learner = Learner(
            train,
            policy,
            generator=generator,
            ranks=self.ranks,
            geometry=recipe_geometry(fitted, accelerator.num_processes),
            stand_in=stand_in(self.cache.conditions(held_out[:1]), generator.latent_shape),
        )
        objective = objective_class(train.objective)
        timed = self.timings if objective.scores_rollouts else None
        score = RolloutScorer(scorer, generator, policy, prompts, timed, stopped=bool(rollout.stop_window))
        parts = Parts(train, rollout, [*scorer.rewards], seed, generator, learner, self.ranks, score)
        self.objective = objective(parts)
        shared: dict[str, Any] = {"generator": generator, "learner": learner, "ranks": self.ranks, "seed": seed}
        self.collector = Collector(rollout, prompts=prompts, cache=self.cache, objective=self.objective, **shared)
        self.audit = Audit(recipe.audit)
        self.auditor = Auditor(self.audit, scorer=scorer, prompts=prompts, rollout=rollout, **shared)
        evaluation, size = recipe.evaluation, fitted.evaluation.micro_batch
        self.held_out = HeldOut(
            held_out,
            cache=self.cache,
            scorer=scorer,
            untrained=UntrainedLatents(evaluation.cache, replace(recipe.model, compile=self.compiled.on), generator),
            evaluation=evaluation,
            micro_batch=size,
            starts_as_base=not recipe.lora.start,
            **shared,
        )
        self.cost = announce(fitted, accelerator.num_processes, self.compiled, tqdm.write) if self.main else {}
        self._start()

    def _start(self) -> None:
        """Claim the run folder and resume. Nothing is written before everything has loaded, so that a failed start does
        not stand in the way of a corrected one."""
        with self.ranks.together():
            self.claim = prepare_run_folder(self.recipe) if self.main else None
        self.epoch = 0
        self.writer = checkpoint.Writer()
        self.compiles = True  # until the first epoch of this process is over
        self.saved: int | None = None  # the epoch whose checkpoint was written last
        self.pending: dict[str, float] | None = None  # an epoch's metrics while its evaluation is still to come
        self.learned: Learned | None = None
        self.before: tuple[Tensors | None, dict[str, Any]] | None = None  # what an interrupted epoch goes back to
        with self.ranks.together():
            self._resume()
        with self.ranks.together():
            if self.main:
                write_recipe(self.recipe)
        self.learner.backend.require_same_weights(self.learner.step)
        first = self.epoch + (self.pending is None) if self.epoch else 0
        self.tracker = Tracker(self.folder, first, self.recipe.tracking) if self.main else None

    def train(self) -> bool:
        """Run the remaining epochs; the metrics of an epoch are one row of metrics.jsonl.

        Returns whether the last epoch was reached. A signal to any process ends the run early, with a checkpoint.
        """
        try:
            every, last = self.recipe.evaluation.every, self.recipe.epochs
            if self.epoch == 0:
                self._log(self._evaluate())
            while self.pending is not None or self.epoch < last:
                if self.pending is None:
                    self.pending = self.run_epoch()
                if self.epoch == last or (every and self.epoch % every == 0):
                    self.pending |= self._evaluate()
                self._log(self.pending)
                self.pending = None
                if self.epoch == last or self.epoch % self.recipe.checkpoint.every == 0:
                    self._save(self.learner.tensors(), self.state_dict())
            with self.ranks.together():
                self.writer.wait()
            with self.ranks.together():
                self._finish()
        except Stopped:
            self._stop()
            return False
        finally:
            self.writer.wait()
        return True

    def run_epoch(self) -> dict[str, float]:
        """Run one round of rollout and update; until its end, `before` is what an interrupted run goes back to."""
        self.prompts.prepare(self.epoch)
        # Where the one step of an epoch is its last act, the tensors stay as they are until then and need no copy.
        every = self.recipe.audit.every
        steps_last = self.learner.geometry.updates == 1 and not (every and self.epoch % every == 0)
        self.before = (None if steps_last else on_cpu(self.learner.tensors()), self.state_dict())
        graphs = compiled_graphs()
        rollouts = self.collector.collect(self.epoch)
        self.learned = learned = self.objective.learn(rollouts, self.epoch)
        metrics = self.cost | learned.metrics | self._recompiled(compiled_graphs() - graphs)
        if learned.finite:
            metrics |= self.auditor.check(self.epoch, learned.rollouts)
        if learned.updated:
            self.learner.policy.after_epoch(self.recipe.train.old_schedule, self.learner.step)
        self.epoch += 1
        self.before = None
        return metrics

    def _recompiled(self, graphs: int) -> dict[str, float]:
        """Report the graphs that rollouts and update compiled; all are expected in the first epoch of a process."""
        expected, self.compiles = self.compiles, False
        if expected or not self.compiled.on:
            return {}
        if graphs and self.main:
            tqdm.write(
                f"warning: torch.compile made {graphs} new graphs in epoch {self.epoch + 1}, which should need none: "
                "run with TORCH_LOGS=recompiles for the reason, or set model.compile=false"
            )
        return {"train/recompilations": float(graphs)}

    def _evaluate(self) -> dict[str, float]:
        scores, pictures = self.held_out.evaluate(self.epoch)
        if self.tracker is not None:
            self.tracker.scores(self.epoch, scores)
            self.tracker.images(self.epoch, pictures)
        return held_out_metrics(scores)

    def _log(self, metrics: dict[str, float]) -> None:
        metrics |= self.timings.take()
        if seconds := epoch_seconds(metrics):
            metrics["images_per_second"] = self.learner.geometry.samples / seconds
        if self.tracker is not None:
            histograms = self.learned.histograms if self.learned else {}
            self.tracker.log(self.epoch, self.learner.step, metrics, histograms)
            tqdm.write(f"epoch {self.epoch}/{self.recipe.epochs}  {epoch_line(metrics)}")

    def state_dict(self) -> dict[str, Any]:
        """Return everything beside the tensors that must survive a restart.

        Of randomness it holds only the seed, since random numbers are addressed by seed, epoch and sample. `prompt_key`
        says which text encoders made the prompts' embeddings, `inputs` which prompts and value models were read.
        """
        return {
            "seed": self.recipe.seed,
            "prompt_key": self.cache.key,
            "inputs": self.inputs,
            "epoch": self.epoch,
            "pending": self.pending,
            "learner": self.learner.state_dict(),
            "audit": self.audit.state_dict(),
        }

    def load_state_dict(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Restore what `state_dict` and `Learner.tensors` returned.

        Raises InputError for the state of another version of this code, or where the text encoders, the prompts or a
        value model have changed.
        """
        checkpoint.require_keys(state, self.state_dict())
        if state["prompt_key"] != self.cache.key:
            raise InputError(
                f"the text encoders of {self.recipe.model.path} are not those that this run began with: put them back, "
                "or give another out=FOLDER"
            )
        require_unchanged(self.recipe, state["inputs"], self.inputs)
        self.learner.load_state_dict(state["learner"], tensors)
        self.audit.load_state_dict(state["audit"])
        self.epoch, self.pending = state["epoch"], null_as_nan(state["pending"]) if state["pending"] else None

    def _save(self, tensors: Tensors, state: dict[str, Any]) -> None:
        self.saved = state["epoch"]
        with self.ranks.together():
            if self.main:
                with self.timings.phase("save"):
                    folder, recipe = self.folder / "checkpoints", self.recipe.checkpoint
                    self.writer.submit(folder, state["epoch"], on_cpu(tensors), state, recipe)

    def _resume(self) -> None:
        warn = tqdm.write if self.main else lambda _: None
        path = checkpoint.choose(self.folder / "checkpoints", self.recipe.checkpoint.resume, warn)
        if path is not None:
            self.load_state_dict(*checkpoint.load(path))
            warn(f"resumed from {path}")

    def _stop(self) -> None:
        """Save what a signal interrupted: an unfinished epoch starts again, a missing evaluation is still to come."""
        if self.pending is not None:
            self.pending |= self.timings.take()
        tensors, state = self.before or (None, self.state_dict())
        epoch = state["epoch"]
        if epoch != self.saved:
            self._save(tensors or self.learner.tensors(), state)
        with self.ranks.together():
            self.writer.wait()
        if self.main:
            message = f"stopped by a signal after epoch {epoch} of {self.recipe.epochs}"
            mark_stopped(message)
            tqdm.write(f"{message}; run again to continue")

    def _finish(self) -> None:
        """Leave what people look at: the averaged adapter as a LoRA file, pictures before and after, and curves."""
        averaged = self.learner.policy.whole("ema")
        before, after = self.held_out.before_and_after(self.epoch)
        if self.tracker is None:
            return
        shown = self.held_out.prompts[: len(before)]
        before_after(before / 255, after / 255, shown, self.folder / "before_after.png")
        header = lora_header(self.recipe, self.learner.generator.transformer.config, self.epoch)
        save_lora(self.folder / "lora.safetensors", averaged, self.learner.policy.scaling(), header)
        self.tracker.close()
        curves(self.folder)
