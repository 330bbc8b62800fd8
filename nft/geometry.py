"""Who works on what: an epoch's samples, cut into micro batches, dealt to any number of processes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nft.config import Recipe


@dataclass(frozen=True)
class Geometry:
    """An epoch's work. Sample n belongs to group n // group_size and to micro batch n // micro_batch.

    Micro batches are the same whatever the number of processes, so every sample is computed in the same company.
    Optimizer step `update` of an epoch uses the micro batches whose number is `update` modulo `updates`.
    """

    groups: int
    group_size: int
    micro_batch: int
    processes: int
    updates: int

    @property
    def samples(self) -> int:
        return self.groups * self.group_size

    @property
    def batches(self) -> int:
        return -(-self.samples // self.micro_batch)

    def members(self, batch: int) -> list[int]:
        """Sample indices of a micro batch; the last one may be short."""
        return list(range(batch * self.micro_batch, min((batch + 1) * self.micro_batch, self.samples)))

    def deal(self, costs: Sequence[float] | None = None) -> list[list[int]]:
        """Every process's micro batches in the order of their rollouts; `costs` are the rollouts', by default equal.

        Processes meet after each one: dealt in the order of their costs, those that meet have taken equally long.
        """
        costs = [0.0] * self.batches if costs is None else costs
        by_cost = costs.__getitem__
        dealt = [
            b for update in range(self.updates) for b in sorted(range(update, self.batches, self.updates), key=by_cost)
        ]
        return [sorted(dealt[rank :: self.processes], key=by_cost) for rank in range(self.processes)]

    def trained_in(self, update: int, own: Iterable[int]) -> list[int]:
        """Which of a process's micro batches one optimizer step uses, in the order that they are trained on."""
        return sorted(batch for batch in own if batch % self.updates == update)

    def samples_in(self, update: int) -> int:
        """Samples that one optimizer step uses over all processes."""
        return sum(len(self.members(batch)) for batch in range(update, self.batches, self.updates))

    def rounds(self, update: int) -> int:
        """Micro batches that every process must run in one optimizer step, short ones with empty ones."""
        return max(len(self.trained_in(update, own)) for own in self.deal())


def geometry_of(recipe: Recipe, processes: int) -> Geometry:
    """The geometry that a recipe has on so many processes."""
    rollout = recipe.rollout
    return Geometry(rollout.groups, rollout.group_size, rollout.micro_batch, processes, recipe.train.updates_per_epoch)
