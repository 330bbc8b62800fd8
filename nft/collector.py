"""An epoch's rollouts on this process: which there are, sampled by the old policy, and scored."""

from collections.abc import Callable
from dataclasses import replace

import torch
from tqdm import tqdm

from nft.geometry import Geometry
from nft.learner import Learner
from nft.objectives.objective import Objective
from nft.prompts import epoch_prompts
from nft.rollout import Rollout, RolloutRecipe, plan_rollout, recut, rollout_stops
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.runs.rank_sync import RankSync
from stitchvm_reward.transfer import RunningMean


class Collector:
    """Samples and scores rollouts of the training prompts.

    The objective says how many solver steps early rollouts end, and whether they are scored here.
    """

    def __init__(
        self,
        rollout: RolloutRecipe,
        seed: int,
        *,
        prompts: list[str],
        cache: PromptCache,
        generator: Generator,
        learner: Learner,
        ranks: RankSync,
        objective: Objective,
    ):
        self.rollout, self.seed, self.prompts, self.cache = rollout, seed, prompts, cache
        self.generator, self.learner, self.ranks = generator, learner, ranks
        self.objective = objective
        self.score = objective.parts.score if objective.scores_rollouts else None
        self.geometry: Geometry = learner.geometry

    def steps(self, epoch: int, samples: list[int]) -> list[int]:
        """Return how many solver steps each sample's rollout takes."""
        left = self.objective.remaining_steps
        return [stop - left for stop in rollout_stops(self.rollout, self.seed, epoch, samples)]

    def collect(self, epoch: int) -> list[Rollout]:
        """Return this process's rollouts of an epoch, on all processes together."""
        geometry, accelerator = self.geometry, self.ranks.accelerator
        chosen = epoch_prompts(len(self.prompts), geometry.groups, self.seed, epoch)
        costs = [sum(self.steps(epoch, geometry.members(part))) for part in range(geometry.parts)]
        parts = geometry.deal(costs)[accelerator.process_index]
        batches = [batch for part in parts for batch in geometry.rollouts(part)]
        plan = self._planner(batches, chosen, epoch)

        rollouts: list[Rollout] = []
        reward = RunningMean()
        bar = tqdm(
            desc=f"epoch {epoch + 1} rollout",
            total=len(batches),
            leave=False,
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )
        planned = plan()
        with bar:
            for _ in self.ranks.rounds(batches):
                with self.ranks.together():
                    if planned is not None:
                        rollout, planned = self._run(planned, epoch, plan)
                        rollouts.append(rollout)
                        bar.update()
                        if self.score is not None and not bar.disable:
                            reward.add(rollout.rewards["total"])
                            bar.set_postfix(reward.shown(), refresh=False)
        return self._for_training(rollouts, parts)

    def _planner(self, batches: list[list[int]], chosen: list[int], epoch: int) -> Callable[[], Rollout | None]:
        """Return what plans the next of some micro batches, and None after the last.

        `chosen` are the groups' prompts. What the network reads of each prompt is on the device once.
        """
        size, queue = self.geometry.group_size, iter(batches)
        distinct = sorted({chosen[n // size] for batch in batches for n in batch}) or chosen[:1]
        places = {prompt: place for place, prompt in enumerate(distinct)}
        table = self.cache.conditions([self.prompts[prompt] for prompt in distinct])

        def plan() -> Rollout | None:
            if (samples := next(queue, None)) is None:
                return None
            prompts = [chosen[n // size] for n in samples]
            rows = [places[prompt] for prompt in prompts]
            return plan_rollout(self.generator, samples, prompts, table=table, rows=rows, seed=self.seed, epoch=epoch)

        return plan

    def _for_training(self, rollouts: list[Rollout], parts: list[int]) -> list[Rollout]:
        """Return a process's rollouts in the micro batches that they are trained on in."""
        by_sample, found = {rollout.samples[0]: rollout for rollout in rollouts}, []
        for part in parts:
            own = [by_sample[batch[0]] for batch in self.geometry.rollouts(part)]
            found += recut(own, self.geometry.trainings(part))
        return found

    def _run(
        self, planned: Rollout, epoch: int, following: Callable[[], Rollout | None]
    ) -> tuple[Rollout, Rollout | None]:
        """Sample and score a planned micro batch; return it and the one that `following` plans meanwhile."""
        stops = self.steps(epoch, planned.samples)
        with self.ranks.timings.phase("rollout"), self.learner.policy.using("old"):
            rollout = self.objective.roll_out(planned, stops, epoch)
            ahead = following()  # while the device works
        if self.score is None:
            return rollout, ahead
        with torch.no_grad():
            return replace(rollout, rewards=self.score(rollout)), ahead
