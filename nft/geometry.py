"""Who works on what: an epoch's samples, cut into micro batches, dealt to any number of processes."""

from dataclasses import dataclass

from nft.config import Recipe
from stitchvm_reward.runs.geometry import share


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

    def own(self, rank: int) -> range:
        """Micro batches of one process."""
        return share(self.batches, rank, self.processes)

    def own_in(self, rank: int, update: int) -> list[int]:
        """Micro batches that a process trains on in one optimizer step."""
        return [batch for batch in self.own(rank) if batch % self.updates == update]

    def samples_in(self, update: int) -> int:
        """Samples that one optimizer step uses over all processes."""
        return sum(len(self.members(batch)) for batch in range(update, self.batches, self.updates))

    def rounds(self, update: int) -> int:
        """Micro batches that every process must run in one optimizer step, short ones with empty ones."""
        return max(len(self.own_in(rank, update)) for rank in range(self.processes))


def geometry_of(recipe: Recipe, processes: int) -> Geometry:
    """The geometry that a recipe has on so many processes."""
    rollout = recipe.rollout
    return Geometry(rollout.groups, rollout.group_size, rollout.micro_batch, processes, recipe.train.updates_per_epoch)
