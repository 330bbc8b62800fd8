"""Two processes exchange what nft.cost.communication counts and nothing else: no weights, latents or pictures."""

import json
from collections import Counter
from pathlib import Path

import pytest

from nft.config import load_recipe
from nft.cost.communication import Message, bytes_per_epoch, bytes_per_evaluation
from tests.distributed.launching import start
from tests.tiny import RECIPE, STOPPED

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("counting.py")
HOW = {"allreduce_": "reduce", "allgather_": "gather"}
# Nine samples in five micro batches, the last one short, in two optimizer steps; five held-out pictures.
UNEVEN = ("rollout.groups=3", "rollout.group_size=3", "rollout.micro_batch=2", "train.updates_per_epoch=2")
RUNS = {
    "full": (*UNEVEN, "evaluation.samples=5", "evaluation.metrics=['miniature.measures:checker']"),
    "stopped": (*UNEVEN, *STOPPED),
}
HEADERS = 1024  # bytes that gloo adds to a collective, at most; nine latents would be 36,864 more


@pytest.fixture(scope="module")
def found(overrides, tmp_path_factory):
    """By run: its recipe, and what crossed."""
    folder = tmp_path_factory.mktemp("communication")
    given = {name: overrides(folder / name, *more) for name, more in RUNS.items()}
    plan = [
        {"recipe": RECIPE, "overrides": settings, "out": str(folder / f"{name}.json")}
        for name, settings in given.items()
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    done = start("ddp", 2, WORKER, folder / "plan.json", timeout=150)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: (load_recipe(RECIPE, settings), json.loads((folder / f"{name}.json").read_text()))
        for name, settings in given.items()
    }


def seen(part: dict) -> Counter:
    """(how, bytes of one process) -> times."""
    return Counter({(HOW.get(name, name), size): times for name, size, times in part["collectives"]})


def expected(messages: list[Message]) -> Counter:
    whole: Counter = Counter()
    for message in messages:
        whole["reduce", message.size] += int(message.times)
    return whole


@pytest.mark.parametrize("name", RUNS)
def test_an_epoch_moves_gradients_and_scores_and_nothing_else(found, name):
    recipe, run = found[name]
    messages = bytes_per_epoch(recipe, run["adapter_parameters"], 2)
    assert seen(run["second"]) == expected(messages)
    assert ("reduce", 4 * run["adapter_parameters"]) in seen(run["second"])
    assert any("audit" in message.what for message in messages) == (name == "stopped")


@pytest.mark.parametrize("name", RUNS)
def test_the_first_epoch_moves_what_every_other_one_does(found, name):
    _, run = found[name]
    assert seen(run["first"]) == seen(run["second"])


@pytest.mark.parametrize("name", RUNS)
def test_an_evaluation_moves_measures_and_the_grid_in_bytes(found, name):
    recipe, run = found[name]
    assert seen(run["evaluation"]) == expected(bytes_per_evaluation(recipe, 2))
    assert ("reduce", 4 * 3 * 64 * 64) in seen(run["evaluation"])


@pytest.mark.parametrize("name", RUNS)
def test_no_weight_crosses_at_the_start_but_a_check_of_each(found, name):
    """The sum and its negative of each parameter's bits, int64, and of the optimizer step."""
    _, run = found[name]
    assert run["network_bytes"] > 30e6
    assert seen(run["start"])["reduce", 2 * 8 * (1 + run["network_parameters"])] == 1
    for part in ("start", "first", "second", "evaluation"):
        assert max(size for _, size in seen(run[part])) < run["network_bytes"] / 50
    assert seen(run["planted"])["broadcast_", run["network_bytes"]] == 1, "weights that cross must be seen"


@pytest.mark.parametrize("name", RUNS)
def test_sockets_send_no_more_than_the_collectives(found, name):
    recipe, run = found[name]
    if run["second"]["sent"] is None:
        pytest.skip("this system does not tell what its sockets sent")
    messages = bytes_per_epoch(recipe, run["adapter_parameters"], 2)
    counted = sum(message.sent(2) for message in messages)
    assert counted <= run["second"]["sent"] <= counted + HEADERS * sum(message.times for message in messages)
