"""Any number of processes works on every sample exactly once."""

import itertools
import random
from dataclasses import replace

import pytest

from nft.geometry import Geometry
from stitchvm_reward.runs.geometry import share

PROCESSES = (1, 2, 3, 5, 7, 8, 16)
SIZES = (
    *((48, 24, 8, 1, 8), (16, 8, 32, 1, 32), (7, 3, 4, 2, 4), (5, 5, 5, 3, 5), (3, 2, 100, 1, 100), (1, 2, 1, 2, 1)),
    *((48, 24, 32, 2, 8), (11, 13, 4, 4, 9), (7, 3, 3, 2, 2)),
)


@pytest.fixture(params=itertools.product(SIZES, PROCESSES), ids=str)
def geometry(request):
    (groups, group_size, micro_batch, updates, train), processes = request.param
    return Geometry(groups, group_size, micro_batch, processes, updates, train)


@pytest.mark.parametrize("kind", ["rollouts", "trainings"])
def test_every_sample_is_in_one_micro_batch_of_one_rank(geometry, kind):
    batches = [batch for own in geometry.deal() for part in own for batch in getattr(geometry, kind)(part)]
    assert sorted(n for batch in batches for n in batch) == list(range(geometry.groups * geometry.group_size))
    size = geometry.micro_batch if kind == "rollouts" else geometry.train_micro_batch
    assert max(map(len, batches)) <= size


def test_every_part_is_trained_on_in_one_update(geometry):
    for own in geometry.deal():
        trained = [part for update in range(geometry.updates) for part in geometry.trained_in(update, own)]
        assert sorted(trained) == sorted(own)


def test_updates_share_the_samples_evenly(geometry):
    shares = [geometry.share(update) for update in range(geometry.updates)]
    assert [n for samples in shares for n in samples] == list(range(geometry.samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_a_samples_update_does_not_depend_on_the_micro_batches(updates):
    found = set()
    for size, train, processes in itertools.product((1, 3, 8, 64), (1, 4, 32), (1, 3)):
        geometry = Geometry(7, 5, size, processes, updates, train)
        found.add(
            tuple(
                tuple(
                    sorted(n for part in geometry.trained_in(u, range(geometry.parts)) for n in geometry.members(part))
                )
                for u in range(updates)
            )
        )
    assert len(found) == 1


def test_rounds_suffice_for_every_rank_and_are_not_wasted_whatever_rollouts_cost(geometry):
    for costs in (None, [7 * part % 5 for part in range(geometry.parts)], list(range(geometry.parts, 0, -1))):
        hands = geometry.deal(costs)
        for update in range(geometry.updates):
            trained = [geometry.trained_in(update, own) for own in hands]
            counts = [sum(len(geometry.trainings(part)) for part in own) for own in trained]
            assert geometry.rounds(update) == max(counts) >= 1


def test_work_is_dealt_evenly(geometry):
    for hands in (geometry.deal(), geometry.deal([7 * part % 5 for part in range(geometry.parts)])):
        assert max(map(len, hands)) - min(map(len, hands)) <= 1
        for update in range(geometry.updates):
            counts = [len(geometry.trained_in(update, own)) for own in hands]
            assert max(counts) - min(counts) <= 1


def test_processes_that_meet_have_worked_equally_long():
    draw = random.Random(0)
    costs = [draw.randint(12, 17) for _ in range(96)]

    def waited(hands):
        return sum(max(turn) * len(turn) - sum(turn) for turn in zip(*([costs[b] for b in own] for own in hands)))

    contiguous = [range(rank * 12, rank * 12 + 12) for rank in range(8)]
    for updates in (1, 2):
        assert 4 * waited(Geometry(96, 8, 8, 8, updates, 8).deal(costs)) < waited(contiguous)


def test_micro_batches_hold_the_same_samples_for_any_number_of_processes(geometry):
    alone = replace(geometry, processes=1)
    assert geometry.parts == alone.parts
    for part in range(alone.parts):
        assert geometry.rollouts(part) == alone.rollouts(part) and geometry.trainings(part) == alone.trainings(part)


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("count", [0, 1, 5, 16, 97])
def test_shares_are_contiguous_and_complete(count, processes):
    parts = [share(count, rank, processes) for rank in range(processes)]
    assert [item for part in parts for item in part] == list(range(count))
