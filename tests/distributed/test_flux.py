"""A guidance-distilled model on two processes: DDP and ZeRO-3, which shards it, compute what one process does."""

from pathlib import Path

import pytest

from tests.distributed.launching import EVEN, furthest, loss_apart, run_all, same_weights, samples, weights
from tests.tiny import DRAFT

pytestmark = pytest.mark.slow

BACKENDS = ("ddp", "zero3")  # the other stages shard nothing of the model; test_backends.py has them
CLOSE = 1e-5
LAST = 2
FLUX = (*EVEN, "model.path=miniature/weights/flux", "model.guidance=3.5", f"checkpoint.keep={LAST + 1}")
STOPPED = (
    "rewards=[{kind: value, value_model: miniature/weights/value/flux/aesthetic}]",
    "rollout.stop_window=[1,2]",
    "rollout.group_size=3",  # the last micro batch is short
)
KINDS = {"full": (), "stopped": STOPPED, "draft": (*DRAFT, "train.draft_steps=2")}


@pytest.fixture(scope="module")
def runs(overrides, tmp_path_factory) -> Path:
    """Folders BACKEND/KIND of runs on two processes, and one/KIND; `resumed` is `stopped` with a restart in between."""
    folder = tmp_path_factory.mktemp("flux")

    def given(out: Path, kind: str, epochs: int = LAST) -> list[str]:
        return overrides(out, *FLUX, *KINDS[kind], f"epochs={epochs}")

    for backend in ("one", *BACKENDS):
        launched, processes = ("ddp", 1) if backend == "one" else (backend, 2)
        place, resumed = folder / backend, folder / backend / "resumed"
        plan = {place / kind: given(place / kind, kind) for kind in KINDS}
        run_all(launched, processes, plan | {resumed: given(resumed, "stopped", 1)})
        run_all(launched, processes, {resumed: given(resumed, "stopped")})
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_compute_what_one_does(runs, backend, kind):
    one, two = runs / "one" / kind, runs / backend / kind
    # Under ZeRO-3 a linear layer adds its bias in a separate operation.
    assert furthest(samples(two, 0), samples(one, 0)) <= (CLOSE if backend == "zero3" else 0)
    assert loss_apart(one, two) <= CLOSE
    for epoch in range(1, LAST + 1):
        assert same_weights(weights(one, epoch), weights(two, epoch), sharded=backend == "zero3")
    assert furthest(weights(one, LAST), weights(one, 1)) > 10 * CLOSE


@pytest.mark.parametrize("backend", ["one", *BACKENDS])
def test_a_run_that_was_stopped_continues_bit_for_bit(runs, backend, digests, rows):
    straight, resumed = runs / backend / "stopped", runs / backend / "resumed"
    assert digests(resumed, LAST) == digests(straight, LAST)
    assert rows(resumed)[-1] == rows(straight)[-1]
