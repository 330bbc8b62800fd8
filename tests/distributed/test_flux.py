"""A guidance-distilled model on two processes: DDP and ZeRO-3, which shards it, compute what one process does."""

from pathlib import Path

import pytest

from tests.distributed.launching import EVEN, furthest, loss_apart, run_all, same_weights, samples, weights
from tests.tiny import DRAFT

pytestmark = pytest.mark.slow

# ZeRO-1 and -2 shard nothing of the model; test_backends.py has them.
BACKENDS = (pytest.param("ddp", marks=pytest.mark.exhaustive), "zero3")
CLOSE = 1e-5
LAST = 2
FLUX = (*EVEN, "model.path=miniature/weights/flux", "model.guidance=3.5", f"checkpoint.keep={LAST + 1}")
STOPPED = (
    "rewards=[{kind: value, value_model: miniature/weights/value/flux/aesthetic}]",
    "rollout.stop_window=[1,2]",
    "rollout.group_size=3",  # the last micro batch is short
)
KINDS = {"full": (), "stopped": STOPPED, "draft": (*DRAFT, "train.draft_steps=2")}


def make(backend: str, processes: int, place: Path, overrides) -> Path:
    """Make runs KIND in a folder; `resumed` is `stopped` with a restart in between."""

    def given(out: Path, kind: str, epochs: int = LAST) -> list[str]:
        return overrides(out, *FLUX, *KINDS[kind], f"epochs={epochs}")

    resumed = place / "resumed"
    plan = {place / kind: given(place / kind, kind) for kind in KINDS}
    run_all(backend, processes, plan | {resumed: given(resumed, "stopped", 1)})
    run_all(backend, processes, {resumed: given(resumed, "stopped")})
    return place


@pytest.fixture(scope="module")
def one(overrides, tmp_path_factory) -> Path:
    return make("ddp", 1, tmp_path_factory.mktemp("one"), overrides)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def two(backend, overrides, tmp_path_factory) -> Path:
    return make(backend, 2, tmp_path_factory.mktemp(backend), overrides)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_compute_what_one_does(backend, one, two, kind):
    alone, together = one / kind, two / kind
    # Under ZeRO-3 a linear layer adds its bias in a separate operation.
    assert furthest(samples(together, 0), samples(alone, 0)) <= (CLOSE if backend == "zero3" else 0)
    assert loss_apart(alone, together) <= CLOSE
    for epoch in range(1, LAST + 1):
        assert same_weights(weights(alone, epoch), weights(together, epoch), sharded=backend == "zero3")
    assert furthest(weights(alone, LAST), weights(alone, 1)) > 10 * CLOSE


def test_a_run_that_was_stopped_continues_bit_for_bit(one, two, digests, rows):
    for runs in (one, two):
        straight, resumed = runs / "stopped", runs / "resumed"
        assert digests(resumed, LAST) == digests(straight, LAST)
        assert rows(resumed)[-1] == rows(straight)[-1]
