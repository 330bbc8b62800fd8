"""With ZeRO-3 no process ever holds the whole base model, not even while it is loaded."""

import json
from pathlib import Path

import pytest

from tests.distributed.launching import start

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("holding.py")


@pytest.fixture(scope="module")
def held(overrides, tmp_path_factory):
    """held(backend, model) -> what each of two processes found; see holding.py."""
    folder = tmp_path_factory.mktemp("held")

    def run(backend: str, model: str) -> list[dict[str, int]]:
        out = folder / f"{backend}-{Path(model).name}"
        plan = {"overrides": overrides(out, f"model.path={model}"), "out": str(out)}
        (folder / "plan.json").write_text(json.dumps(plan))
        done = start(backend, 2, WORKER, folder / "plan.json", timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in (0, 1)]

    return run


@pytest.mark.parametrize("model", ["miniature/weights/sd3", "miniature/weights/flux"])
def test_a_process_holds_its_shards_and_one_block_at_most(held, model):
    for found in held("zero3", model):
        # Three adapters, of which one has a gradient and is copied for the optimizer.
        beside = found["vae"] + 8 * found["adapters"]
        assert found["most"] <= found["whole"] / 2 + 2 * found["block"] + beside, found
        assert found["most"] < found["whole"], found
        assert found["held"] <= found["whole"] / 2 + found["block"] + beside, found


def test_without_sharding_a_process_holds_the_whole_model(held):
    """Which shows that the count would see it."""
    assert all(found["most"] >= found["whole"] for found in held("ddp", "miniature/weights/sd3"))
