"""Advantage-weighted matching and Flow-GRPO on several processes, DDP and ZeRO alike, as on one."""

from pathlib import Path

import pytest

from tests.distributed.launching import EVEN, furthest, loss_apart, run_all, samples, weights
from tests.tiny import AWM, FLOW_GRPO, STOPPED

pytestmark = pytest.mark.slow

CLOSE = 1e-5
BACKENDS = ("ddp", pytest.param("zero2", marks=pytest.mark.exhaustive))
# Nine samples in five micro batches, the last one short: a process has none left where the other has one.
UNEVEN = ("rollout.groups=3", "rollout.group_size=3", "rollout.micro_batch=2", "train.updates_per_epoch=2")
COMMON = (*EVEN, *UNEVEN, "checkpoint.keep=9", "train.beta_kl=1e-3", "train.learning_rate=1e-4")
RUNS = {
    "awm": (*COMMON, *AWM, *STOPPED, "train.reference_share=1"),
    "flow_grpo": (*COMMON, *FLOW_GRPO, "train.sde_steps=2", "train.sde_within=3", "train.sde_clip=1"),
}
LAST = 3


@pytest.fixture(scope="module")
def one(overrides, tmp_path_factory) -> Path:
    """Folders NAME of runs on one process."""
    place = tmp_path_factory.mktemp("one")
    run_all("ddp", 1, {place / name: overrides(place / name, *given, f"epochs={LAST}") for name, given in RUNS.items()})
    return place


@pytest.fixture(scope="module", params=BACKENDS)
def two(request, overrides, tmp_path_factory) -> Path:
    """Folders NAME of runs on two processes; NAME-stopped ends after an epoch and goes on."""
    place, first, further = tmp_path_factory.mktemp(request.param), {}, {}
    for name, given in RUNS.items():
        straight, stopped = place / name, place / f"{name}-stopped"
        first[straight] = overrides(straight, *given, f"epochs={LAST}")
        first[stopped] = overrides(stopped, *given, "epochs=1")
        further[stopped] = overrides(stopped, *given, f"epochs={LAST}")
    run_all(request.param, 2, first)
    run_all(request.param, 2, further)
    return place


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_compute_what_one_does(one, two, name):
    alone, together = one / name, two / name
    assert furthest(samples(together, 0), samples(alone, 0)) == 0
    assert loss_apart(alone, together) <= CLOSE
    for epoch in range(1, LAST + 1):
        assert furthest(weights(alone, epoch), weights(together, epoch)) <= CLOSE
    assert furthest(weights(alone, LAST), weights(alone, 1)) > 10 * CLOSE


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(two, name, digests, rows):
    straight, stopped = two / name, two / f"{name}-stopped"
    assert digests(stopped, LAST) == digests(straight, LAST)
    assert rows(stopped)[2:] == rows(straight)[2:]
