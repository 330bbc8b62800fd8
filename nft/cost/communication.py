"""What the processes of a run exchange, in bytes, and an estimate of what that costs on many GPUs.

The counts follow the code of the trainer without DeepSpeed; tests/distributed/test_communication.py compares them with
what two processes really exchange.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import mean
from typing import Any

from nft.config import Recipe
from nft.cost.plan import recipe_geometry, work
from nft.cost.shapes import Costs
from nft.geometry import Geometry
from nft.objectives import objective_class
from nft.rollout import stop_step
from stitchvm_reward.runs.geometry import share

GRADIENT, SCORE, MEETING = 4, 8, 3 * 8  # bytes: a float32, a float64, the three int64 of RankSync.sync
TERM = 4  # bytes: a float32
EPOCHS = 4  # an estimate is averaged over the stops of this many epochs


@dataclass(frozen=True)
class Message:
    """One kind of reduction over all processes: how many `times`, and the bytes that a process contributes to each."""

    what: str
    times: float
    size: int

    @property
    def bytes(self) -> float:
        """Bytes that a process contributes to all of them."""
        return self.times * self.size

    def sent(self, processes: int) -> float:
        """Return the bytes that each process sends for them in a ring, on average."""
        return 2 * (processes - 1) / processes * self.bytes


def bytes_per_epoch(recipe: Recipe, adapter_parameters: int, processes: int) -> list[Message]:
    """Return every message of one epoch of rollout, scoring, audit and training; none for a single process.

    The gradients of all adapters are one message. Audits are spread over the epochs. Evaluation is separate; a
    checkpoint, a start and an end need a few syncs more.
    """
    if processes == 1:
        return []
    geometry, updates = recipe_geometry(recipe, processes), recipe.train.updates_per_epoch
    objective = objective_class(recipe.train.objective)
    rounds = sum(geometry.rounds(update) for update in range(updates))
    scores = SCORE * geometry.samples
    audits = 1 / recipe.audit.every if recipe.audit.every else 0.0
    messages = [
        Message("gradients", updates, GRADIENT * adapter_parameters),
        Message("loss sums", updates, TERM * (len(objective.terms) + 1)),
        # Each reward and their sum; per sample, its prompt and the level at which its rollout stopped.
        Message("rewards", len(recipe.rewards) + 1, scores),
        Message("groups and tau", objective.gathered, scores),
        Message("meetings of the rollout", 1 + max(geometry.rollout_rounds()), MEETING),
        Message("meetings of the training", rounds + objective.syncs_per_update * updates, MEETING),
        Message("audit: values and rewards", 2 * audits, scores),
        Message("audit: meeting", audits, MEETING),
    ]
    return [message for message in messages if message.times]


def bytes_per_evaluation(recipe: Recipe, processes: int) -> list[Message]:
    """Return every message of one evaluation; none for a single process."""
    if processes == 1:
        return []
    count, side = recipe.evaluation.samples, recipe.model.resolution
    size = recipe.evaluation.micro_batch or recipe.rollout.micro_batch
    batches = [-(-len(share(count, rank, processes)) // size) for rank in range(processes)]
    measures = len(recipe.rewards) + 1 + len(recipe.evaluation.metrics)
    return [
        Message("evaluation: measures", measures, SCORE * count),
        Message("evaluation: picture grid", 1, recipe.evaluation.grid * 3 * side * side),
        Message("evaluation: meetings", 1 + max(batches), MEETING),
    ]


@dataclass(frozen=True)
class Cluster:
    """Assumptions about a machine, none of them measured: FLOP/s, bytes per second, seconds."""

    peak: float = 989e12
    """FLOP/s of one GPU: H100, dense bf16, from its data sheet."""
    reached: float = 0.45
    """Share of that peak that every phase reaches, for any micro batch."""
    node: int = 8
    """GPUs connected by NVLink."""
    inside: float = 450e9
    """Bandwidth of each GPU within a node."""
    between: float = 50e9
    """Bandwidth of each GPU between nodes: 400 Gb/s InfiniBand. A ring over several nodes is assumed to be this slow
    throughout."""
    latency: float = 10e-6
    """Seconds per step of a collective."""

    def seconds(self, message: Message, processes: int) -> float:
        """Return the time of all messages of one kind, with no overlap with computation.

        Bytes are counted as in a ring all-reduce, steps as in a tree: up and down once.
        """
        if processes == 1:
            return 0.0
        steps = 2 * math.ceil(math.log2(processes))
        bandwidth = self.inside if processes <= self.node else self.between
        return message.sent(processes) / bandwidth + message.times * steps * self.latency


def grown(recipe: Recipe, processes: int, base: int) -> Recipe:
    """Return the recipe with more groups: as many per GPU on `processes` as it has on `base` of them."""
    return replace(recipe, rollout=replace(recipe.rollout, groups=-(-recipe.rollout.groups * processes // base)))


def _rounds(costs: Sequence[Sequence[float]]) -> float:
    """Return the total cost of processes that sync after each micro batch: per round, that of the most expensive one.

    `costs` are those of the micro batches of each process, in order.
    """
    return sum(map(max, zip_longest(*costs, fillvalue=0.0)))


def _flops(recipe: Recipe, geometry: Geometry, cost: Costs, stops: Sequence[float]) -> tuple[float, float]:
    """Return the FLOPs per process and epoch: an even share of the work, and with the waits in each round.

    `stops` are the solver steps of each group.
    """
    phases = {name: 1e12 * size / geometry.samples for name, size in work(recipe, geometry, cost).items()}
    after = phases["decode"] + phases["score"]
    left = objective_class(recipe.train.objective).cost(recipe.train).solver_steps

    def steps(samples: list[int]) -> float:
        return sum(stops[n // geometry.group_size] for n in samples)

    def rolled_out(samples: list[int]) -> float:
        return (steps(samples) - len(samples) * left) * cost.forward_flops + len(samples) * after

    dealt = geometry.deal([steps(geometry.members(part)) for part in range(geometry.parts)])
    waited = _rounds([[rolled_out(batch) for part in parts for batch in geometry.rollouts(part)] for parts in dealt])
    for update in range(geometry.updates):
        trained = [geometry.trained_in(update, parts) for parts in dealt]
        waited += _rounds(
            [
                [len(batch) * phases["train"] for part in parts for batch in geometry.trainings(part)]
                for parts in trained
            ]
        )
    everything = rolled_out(list(range(geometry.samples))) + geometry.samples * phases["train"]
    return everything / geometry.processes, waited


def estimate(recipe: Recipe, cost: Costs, processes: int, cluster: Cluster) -> dict[str, Any]:
    """Return the seconds of an epoch on so many GPUs by cause, the images per second and the efficiency.

    `seconds_even` is the time of an even share of the work. The processes sync after every micro batch:
    `seconds_undivided` is lost where the number of micro batches is not a multiple of the processes, `seconds_stops`
    where rollouts that stop at different steps wait. `efficiency` is the even share divided by the total.
    Audits, evaluation and checkpoints are not included.
    """
    geometry, window = recipe_geometry(recipe, processes), recipe.rollout.stop_window
    level = sum(window) / 2 if window else recipe.rollout.steps
    rate = cluster.peak * cluster.reached
    even, waited = (flops / rate for flops in _flops(recipe, geometry, cost, [level] * geometry.groups))
    undivided, at_stops = waited - even, 0.0
    if window:
        drawn = (
            [stop_step(recipe.seed, epoch, group, window) for group in range(geometry.groups)]
            for epoch in range(EPOCHS)
        )
        lost = [after - before for before, after in (_flops(recipe, geometry, cost, stops) for stops in drawn)]
        at_stops = mean(lost) / rate - undivided
    messages = [m for m in bytes_per_epoch(recipe, cost.adapter_parameters, processes) if "audit" not in m.what]
    spent = {m.what: cluster.seconds(m, processes) for m in messages}
    gradients = spent.get("gradients", 0.0)
    others = sum(spent.values()) - gradients
    whole = even + undivided + at_stops + gradients + others
    return {
        "processes": processes,
        "samples": geometry.samples,
        "micro_batches": sum(geometry.rollout_rounds()),
        "most_micro_batches": max(geometry.rollout_rounds()),
        "seconds_even": even,
        "seconds_undivided": undivided,
        "seconds_stops": at_stops,
        "seconds_gradients": gradients,
        "seconds_other_messages": others,
        "images_per_second": geometry.samples / whole,
        "efficiency": even / whole,
    }


def message_lines(messages: list[Message], processes: int) -> list[str]:
    """Return a table of messages."""
    table = [f"{'message':28}{'times':>8}{'bytes each':>14}{'bytes':>14}{'sent/process':>16}"]
    for m in messages:
        table.append(f"{m.what:28}{m.times:8.4g}{m.size:14,}{m.bytes:14,.0f}{m.sent(processes):16,.0f}")
    return table


def estimate_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of estimates."""
    table = [
        f"{'epoch':8}{'GPUs':>6}{'images':>9}{'most':>6}{'even s':>9}{'undivided':>11}{'stops':>8}{'gradients':>11}"
        f"{'others':>8}{'images/s':>10}{'efficiency':>12}"
    ]
    for row in rows:
        table.append(
            f"{row['epoch']:8}{row['processes']:6}{row['samples']:9,}{row['most_micro_batches']:6}"
            f"{row['seconds_even']:9.3f}{row['seconds_undivided']:11.3f}{row['seconds_stops']:8.3f}"
            f"{row['seconds_gradients']:11.4f}{row['seconds_other_messages']:8.3f}"
            f"{row['images_per_second']:10.0f}{row['efficiency']:12.1%}"
        )
    return table
