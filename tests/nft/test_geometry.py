"""Any number of processes works on every sample exactly once."""

import itertools
import random

import pytest

from nft.geometry import Geometry
from stitchvm_reward.runs.geometry import share

PROCESSES = (1, 2, 3, 5, 7, 8, 16)
SIZES = ((48, 24, 8, 1), (16, 8, 32, 1), (7, 3, 4, 2), (5, 5, 5, 3), (3, 2, 100, 1), (11, 13, 9, 4), (1, 2, 1, 2))


@pytest.fixture(params=itertools.product(SIZES, PROCESSES), ids=str)
def geometry(request):
    (groups, group_size, micro_batch, updates), processes = request.param
    return Geometry(groups, group_size, micro_batch, processes, updates)


def test_every_sample_is_in_one_micro_batch_of_one_rank(geometry):
    owned = [n for own in geometry.deal() for batch in own for n in geometry.members(batch)]
    assert sorted(owned) == list(range(geometry.groups * geometry.group_size))


def test_every_micro_batch_is_trained_on_in_one_update(geometry):
    for own in geometry.deal():
        trained = [batch for update in range(geometry.updates) for batch in geometry.trained_in(update, own)]
        assert sorted(trained) == sorted(own)


def test_samples_of_all_updates_sum_to_all(geometry):
    found = [geometry.samples_in(update) for update in range(geometry.updates)]
    assert sum(found) == geometry.samples and min(found) > 0


def test_samples_in_an_update_are_those_its_ranks_own(geometry):
    for update in range(geometry.updates):
        batches = [batch for own in geometry.deal() for batch in geometry.trained_in(update, own)]
        assert geometry.samples_in(update) == sum(len(geometry.members(batch)) for batch in batches)


def test_rounds_suffice_for_every_rank_and_are_not_wasted(geometry):
    for update in range(geometry.updates):
        counts = [len(geometry.trained_in(update, own)) for own in geometry.deal()]
        assert geometry.rounds(update) == max(counts) >= 1


def test_work_is_dealt_evenly(geometry):
    for hands in (geometry.deal(), geometry.deal([7 * batch % 5 for batch in range(geometry.batches)])):
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
        assert 4 * waited(Geometry(96, 8, 8, 8, updates).deal(costs)) < waited(contiguous)


def test_micro_batches_hold_the_same_samples_for_any_number_of_processes(geometry):
    alone = Geometry(geometry.groups, geometry.group_size, geometry.micro_batch, 1, geometry.updates)
    assert geometry.batches == alone.batches
    assert all(geometry.members(batch) == alone.members(batch) for batch in range(alone.batches))
    assert all(geometry.samples_in(update) == alone.samples_in(update) for update in range(alone.updates))


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("count", [0, 1, 5, 16, 97])
def test_shares_are_contiguous_and_complete(count, processes):
    parts = [share(count, rank, processes) for rank in range(processes)]
    assert [item for part in parts for item in part] == list(range(count))
