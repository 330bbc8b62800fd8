"""What is found while an epoch runs: peaks of memory by phase, and faults with the line of code that they come from."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tests.tiny import ROOT

BLOCK = 512  # bytes: what CUDA's allocator rounds sizes up to
PACKAGES = tuple(str(ROOT / package) for package in ("nft", "stitchvm_reward", "tests/fake_cuda/planted"))


class Fault(Exception):
    """What cannot run on the device, or must not."""


def _line_of_code() -> str:
    """Return the innermost line of this repository that is being run; backward passes run apart from any."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGES):
            return f"{name.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "a backward pass"


class Watch:
    """Live bytes on the device, their peak in each phase, and how often which fault occurred in which inner loop.

    `inner` are the inner loops at hand, outermost first. In `meant`, float32 products are meant: what belongs to it are
    storages of networks that recipes keep in float32 and of what is computed from them.
    """

    def __init__(self):
        self.live = 0
        self.sizes: dict[int, int] = {}
        self.meant: set[int] = set()
        self.clear()

    def clear(self) -> None:
        """Begin another run. What still lives from an earlier one goes on being counted."""
        self.phases: list[str] = []
        self.inner: list[str] = []
        self.peaks: dict[str, int] = {}
        self.syncs: dict[str, Counter[str]] = {}
        self.products: dict[str, Counter[str]] = {}

    # Memory

    def created(self, tensor: Tensor) -> int:
        """Count a tensor's storage for as long as it lives, and return its key."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.sizes[key] = size
            self.live += size
            for phase in self.phases or ["load"]:
                self.peaks[phase] = max(self.peaks.get(phase, 0), self.live)
            weakref.finalize(storage, self._freed, key)
        return key

    def _freed(self, key: int) -> None:
        self.live -= self.sizes.pop(key)
        self.meant.discard(key)

    # Where the run is

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Run a phase; what it peaks at counts for the phases around it too."""
        self.phases.append(name)
        self.peaks[name] = max(self.peaks.get(name, 0), self.live)
        try:
            yield
        finally:
            self.phases.pop()

    @contextmanager
    def loop(self, name: str) -> Iterator[None]:
        """Run an inner loop, in which the device must never be waited for."""
        self.inner.append(name)
        try:
            yield
        finally:
            self.inner.pop()

    # Faults

    def _note(self, faults: dict[str, Counter[str]], what: str) -> None:
        if self.inner:
            phase = self.phases[-1] if self.phases else "load"
            faults.setdefault(phase, Counter())[f"{self.inner[-1]}: {what} at {_line_of_code()}"] += 1

    def synchronised(self, what: str) -> None:
        """Record that the device was waited for, where that is in an inner loop."""
        self._note(self.syncs, what)

    def float32_product(self, what: str) -> None:
        """Record a float32 product, where that is in an inner loop."""
        self._note(self.products, what)
