"""Advantage-weighted matching and Flow-GRPO on several processes, DDP and ZeRO alike, as on one."""

from pathlib import Path

import pytest

from tests.distributed.launching import EVEN, furthest, loss_apart, run_all, samples, weights
from tests.tiny import AWM, FLOW_GRPO, STOPPED

pytestmark = pytest.mark.slow

CLOSE = 1e-5
BACKENDS = ("ddp", "zero2")
# Nine samples in five micro batches, the last one short: a process has none left where the other has one.
UNEVEN = ("rollout.groups=3", "rollout.group_size=3", "rollout.micro_batch=2", "train.updates_per_epoch=2")
COMMON = (*EVEN, *UNEVEN, "checkpoint.keep=9", "train.beta_kl=1e-3", "train.learning_rate=1e-4")
RUNS = {
    "awm": (*COMMON, *AWM, *STOPPED, "train.reference_share=1"),
    "flow_grpo": (*COMMON, *FLOW_GRPO, "train.sde_steps=2", "train.sde_within=3", "train.sde_clip=1"),
}
LAST = 3


@pytest.fixture(scope="module")
def runs(overrides, tmp_path_factory) -> Path:
    """Folders BACKEND/NAME of runs on two processes, and one/NAME; NAME-stopped ends after an epoch and goes on."""
    folder = tmp_path_factory.mktemp("objectives")
    for backend, processes in (("one", 1), *((name, 2) for name in BACKENDS)):
        place, given, further = folder / backend, {}, {}
        for name, settings in RUNS.items():
            out, stopped = place / name, place / f"{name}-stopped"
            given[out] = overrides(out, *settings, f"epochs={LAST}")
            given[stopped] = overrides(stopped, *settings, "epochs=1")
            further[stopped] = overrides(stopped, *settings, f"epochs={LAST}")
        run_all("ddp" if backend == "one" else backend, processes, given)
        if backend != "one":
            run_all(backend, processes, further)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_compute_what_one_does(runs, backend, name):
    one, two = runs / "one" / name, runs / backend / name
    assert furthest(samples(two, 0), samples(one, 0)) == 0
    assert loss_apart(one, two) <= CLOSE
    for epoch in range(1, LAST + 1):
        assert furthest(weights(one, epoch), weights(two, epoch)) <= CLOSE
    assert furthest(weights(one, LAST), weights(one, 1)) > 10 * CLOSE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(runs, backend, name, digests, rows):
    straight, stopped = runs / backend / name, runs / backend / f"{name}-stopped"
    assert digests(stopped, LAST) == digests(straight, LAST)
    assert rows(stopped)[2:] == rows(straight)[2:]
