"""Which process works on what: an epoch's samples in micro batches, distributed over any number of processes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from nft.rollout import RolloutRecipe
from stitchvm_reward.runs.geometry import share


def cut(samples: Sequence[int], size: int) -> list[list[int]]:
    """Return the samples in runs of `size`; the last one may be short."""
    return [list(samples[start : start + size]) for start in range(0, len(samples), size)]


@dataclass(frozen=True)
class Geometry:
    """An epoch's work. Sample n belongs to group n // group_size.

    Each optimizer step of an epoch uses a contiguous share of the samples, whatever the micro batches are. A part is
    what one process rolls out and trains on: consecutive samples of one step, as many as the larger micro batch. Inside
    a part, rollouts are made `micro_batch` samples at once and trained on `train_micro_batch` at once. Parts do not
    depend on the number of processes, so every sample is always computed together with the same others.
    """

    groups: int
    group_size: int
    micro_batch: int
    processes: int
    updates: int
    train_micro_batch: int

    @property
    def samples(self) -> int:
        return self.groups * self.group_size

    def share(self, update: int) -> range:
        """Return the samples that an optimizer step uses over all processes."""
        return share(self.samples, update, self.updates)

    @cached_property
    def _parts(self) -> list[tuple[int, list[int]]]:
        """The update and the samples of every part."""
        size = max(self.micro_batch, self.train_micro_batch)
        return [(update, part) for update in range(self.updates) for part in cut(self.share(update), size)]

    @property
    def parts(self) -> int:
        return len(self._parts)

    def members(self, part: int) -> list[int]:
        """Return the sample indices of a part; the last part of each update may be short."""
        return self._parts[part][1]

    def rollouts(self, part: int) -> list[list[int]]:
        """Return the micro batches in which a part is rolled out."""
        return cut(self.members(part), self.micro_batch)

    def trainings(self, part: int) -> list[list[int]]:
        """Return the micro batches in which a part is trained on."""
        return cut(self.members(part), self.train_micro_batch)

    def deal(self, costs: Sequence[float] | None = None) -> list[list[int]]:
        """Return every process's parts in the order of their rollouts.

        `costs` are the costs of the parts' rollouts, by default equal. Processes sync after each micro batch: in the
        order of their costs, those that meet have taken equally long. How many parts of which size a process has does
        not depend on the costs.
        """
        costs = [0.0] * self.parts if costs is None else costs
        by_cost = costs.__getitem__
        dealt: list[int] = []
        for update in range(self.updates):
            mine = [part for part, (of, _) in enumerate(self._parts) if of == update]
            dealt += [*sorted(mine[:-1], key=by_cost), mine[-1]]  # the last one, perhaps short, always comes last
        return [sorted(dealt[rank :: self.processes], key=by_cost) for rank in range(self.processes)]

    def trained_in(self, update: int, parts: Iterable[int]) -> list[int]:
        """Return which of a process's parts an optimizer step uses, in training order."""
        return sorted(part for part in parts if self._parts[part][0] == update)

    def rounds(self, update: int) -> int:
        """Return the micro batches that every process trains on in a step; those with fewer run stand-ins."""
        return max(sum(len(self.trainings(part)) for part in self.trained_in(update, parts)) for parts in self.deal())

    def rollout_rounds(self) -> list[int]:
        """Return the number of rollouts' micro batches of every process."""
        return [sum(len(self.rollouts(part)) for part in parts) for parts in self.deal()]


def geometry_of(rollout: RolloutRecipe, updates: int, processes: int, train_micro_batch: int | None) -> Geometry:
    """Return the geometry of a recipe's rollouts with `updates` optimizer steps per epoch on so many processes.

    `train_micro_batch` is by default that of the rollouts.
    """
    size = rollout.micro_batch
    return Geometry(rollout.groups, rollout.group_size, size, processes, updates, train_micro_batch or size)
