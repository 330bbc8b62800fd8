"""The table of what the backends compute, each on two processes, against one process that accumulates.

python -m tests.distributed.differences prints, over five optimizer steps, the largest difference of any epoch's loss
and of any adapter weight; faults that such a comparison must find stand below.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from tests.distributed.launching import BACKENDS, EVEN, FAULTS, furthest, loss_apart, run_all, weights
from tests.tiny import TINY, few_prompts

EPOCHS = 5
NAMES = {
    "unreduced": "gradients that are not reduced (ddp)",
    "moments": "Adam's moments lost at a restart after two epochs (one process)",
    "old": "the old adapter begun anew there (one process)",
}


def apart(one: Path, other: Path) -> tuple[float, float]:
    """The largest difference of loss and of weights over all epochs of two runs."""
    most = max(furthest(weights(one, epoch), weights(other, epoch)) for epoch in range(1, EPOCHS + 1))
    return loss_apart(one, other), most


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = few_prompts(folder / "prompts")

        def given(out: Path, *more: str) -> list[str]:
            return [*TINY, *prompts, *EVEN, f"epochs={EPOCHS}", *more, f"out={out}"]

        one, first = folder / "one", folder / "first"
        run_all("ddp", 1, {one: given(one), first: given(first, "epochs=2")})
        lost = [folder / fault for fault in FAULTS if fault != "unreduced"]
        for out in lost:
            shutil.copytree(first, out)
        run_all("ddp", 1, {out: given(out) for out in lost})
        for backend in BACKENDS:
            runs = [folder / backend] + ([folder / "unreduced"] if backend == "ddp" else [])
            run_all(backend, 2, {out: given(out) for out in runs})
        print(f"{'against one process with accumulation of two':64}{'loss':>10}{'weights':>10}")
        for out in (*BACKENDS, *FAULTS):
            loss, most = apart(one, folder / out)
            told = f"{out}, two processes" if out in BACKENDS else NAMES[out]
            print(f"{told:64}{loss:10.1e}{most:10.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
