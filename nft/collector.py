"""An epoch's rollouts on this process: which there are, sampled by the old policy, and scored."""

from dataclasses import replace

import torch
from tqdm import tqdm

from nft.geometry import Geometry
from nft.learner import Learner
from nft.objectives.objective import Objective
from nft.prompts import epoch_prompts
from nft.rollout import Rollout, RolloutRecipe, plan_rollout, roll_out, rollout_stops
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.runs.rank_sync import RankSync


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
        self.remaining_steps = objective.remaining_steps
        self.score = objective.parts.score if objective.scores_rollouts else None
        self.geometry: Geometry = learner.geometry
        self.sigmas = generator.sigmas(rollout.steps)

    def steps(self, epoch: int, samples: list[int]) -> list[int]:
        """Return how many solver steps each sample's rollout takes."""
        return [stop - self.remaining_steps for stop in rollout_stops(self.rollout, self.seed, epoch, samples)]

    def collect(self, epoch: int) -> list[Rollout]:
        """Return this process's rollouts of an epoch, on all processes together."""
        geometry, accelerator = self.geometry, self.ranks.accelerator
        chosen = epoch_prompts(len(self.prompts), geometry.groups, self.seed, epoch)
        costs = [sum(self.steps(epoch, geometry.members(batch))) for batch in range(geometry.batches)]
        batches = geometry.deal(costs)[accelerator.process_index]
        prompts = {batch: [chosen[n // geometry.group_size] for n in geometry.members(batch)] for batch in batches}
        distinct = sorted({prompt for members in prompts.values() for prompt in members}) or [0]
        table = self.cache.conditions([self.prompts[prompt] for prompt in distinct])
        rollouts: list[Rollout] = []
        bar = tqdm(
            desc=f"epoch {epoch + 1} rollout",
            total=len(batches),
            leave=False,
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )
        with bar:
            for batch in self.ranks.rounds(batches):
                with self.ranks.together():
                    if batch is not None:
                        rows = torch.tensor([distinct.index(p) for p in prompts[batch]], device=accelerator.device)
                        planned = plan_rollout(geometry.members(batch), prompts[batch], table, rows)
                        rollouts.append(self._run(planned, epoch))
                        bar.update()
                if self.score is not None:
                    bar.set_postfix(_reward_so_far(rollouts), refresh=False)
        return rollouts

    def _run(self, planned: Rollout, epoch: int) -> Rollout:
        """Sample and score a planned micro batch."""
        with self.ranks.timings.phase("rollout"), self.learner.policy.using("old"):
            rollout = roll_out(
                self.generator,
                self.learner.sampler,
                planned,
                self.sigmas,
                seed=self.seed,
                epoch=epoch,
                solver=self.rollout.solver,
                stops=self.steps(epoch, planned.samples),
            )
        if self.score is None:
            return rollout
        with torch.no_grad():
            return replace(rollout, rewards=self.score(rollout))


def _reward_so_far(rollouts: list[Rollout]) -> dict[str, str]:
    """Return the mean total reward, for a progress bar."""
    if not rollouts:
        return {}
    return {"reward": f"{float(torch.cat([rollout.rewards['total'] for rollout in rollouts]).mean()):.3f}"}
