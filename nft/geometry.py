"""Which process works on what: an epoch's samples in micro batches, distributed over any number of processes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nft.rollout import RolloutRecipe


@dataclass(frozen=True)
class Geometry:
    """An epoch's work. Sample n belongs to group n // group_size and to micro batch n // micro_batch.

    Micro batches do not depend on the number of processes, so every sample is always computed together with the same
    others. Optimizer step `update` of an epoch uses the micro batches whose number is `update` modulo `updates`.
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
        """Return the sample indices of a micro batch; the last one may be short."""
        return list(range(batch * self.micro_batch, min((batch + 1) * self.micro_batch, self.samples)))

    def deal(self, costs: Sequence[float] | None = None) -> list[list[int]]:
        """Return every process's micro batches in the order of their rollouts.

        `costs` are the costs of the rollouts, by default equal. Processes sync after each micro batch: in the order of
        their costs, those that meet have taken equally long.
        """
        costs = [0.0] * self.batches if costs is None else costs
        by_cost = costs.__getitem__
        dealt = [
            b for update in range(self.updates) for b in sorted(range(update, self.batches, self.updates), key=by_cost)
        ]
        return [sorted(dealt[rank :: self.processes], key=by_cost) for rank in range(self.processes)]

    def trained_in(self, update: int, batches: Iterable[int]) -> list[int]:
        """Return which of a process's micro batches an optimizer step uses, in training order."""
        return sorted(batch for batch in batches if batch % self.updates == update)

    def samples_in(self, update: int) -> int:
        """Return the number of samples that an optimizer step uses over all processes."""
        return sum(len(self.members(batch)) for batch in range(update, self.batches, self.updates))

    def rounds(self, update: int) -> int:
        """Return the micro batches that every process runs in an optimizer step; those with fewer run stand-ins."""
        return max(len(self.trained_in(update, batches)) for batches in self.deal())


def geometry_of(rollout: RolloutRecipe, updates: int, processes: int) -> Geometry:
    """Return the geometry of a recipe's rollouts with `updates` optimizer steps per epoch on so many processes."""
    return Geometry(rollout.groups, rollout.group_size, rollout.micro_batch, processes, updates)
