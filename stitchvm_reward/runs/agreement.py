"""Processes that stop together: a signal to one of them, or a failure of one, is known to all at the same point."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from stitchvm_reward.errors import InputError, SharedError
from stitchvm_reward.runs.tracking import Timings

Result = TypeVar("Result")
Parts = list[tuple[list[int], Tensor]]
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def _nothing() -> None:
    return None


@contextmanager
def watched(timings: Timings, seconds: float, process: int) -> Iterator[None]:
    """End this process with an error that names the phase when its work has not moved for so many seconds.

    A collective that waits for a process that hangs or is gone may not come back, and not be interrupted either;
    so a thread watches, and ends the process from there.
    """
    done = threading.Event()
    timings.move()

    def watch() -> None:
        while not done.wait(min(1.0, seconds / 10)):
            if time.monotonic() - timings.moved > seconds:
                told = (
                    f"process {process} has not moved for {seconds:g} s in phase {timings.current}: another hangs or "
                    "is gone, or a step takes longer than `timeout` allows; run again to go on from the last checkpoint"
                )
                print(f"error: {told}", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


class Stopped(Exception):
    """A signal asked the run to end; every process raises it at the same point."""


class Agreement:
    """What the processes tell each other between two pieces of work that need no communication."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.timings = accelerator, Timings()
        self.asked, self.stopped = False, False
        self.idle: Callable[[], None] = _nothing  # what a process does before a meeting while others still work

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 as the wish to stop at the next point; a second one ends the process at once."""
        for number in SIGNALS:
            signal.signal(number, self._ask)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # launch/slurm/rank.py holds back those that come earlier

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True

    def settle(self, error: Exception | None = None, count: int = 0) -> int:
        """Meet all processes here; `error` is what went wrong on this one. Returns the largest `count` of them.

        Raises Stopped everywhere when any was asked to stop, though only once, and where any failed, that error there
        and SharedError with its message on the others. All meetings are of one kind, so a process that failed meets
        the others at whichever they come to next.
        """
        mine = [int(self.asked), int(error is not None), count]
        if self.accelerator.num_processes == 1:
            asked, failed, most = mine
        else:
            with self.timings.meeting():
                largest = torch.tensor(mine, device=self.accelerator.device)
                torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
                asked, failed, most = largest.tolist()
        self.timings.move()
        if failed:
            told = [text for text in gather_object([None if error is None else str(error)]) if text is not None]
            if error is not None and not isinstance(error, InputError):
                raise error
            raise SharedError(told[0]) from error
        if asked and not self.stopped:
            self.stopped = True
            raise Stopped
        return most

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, once it is known that no process failed in it or was asked to stop."""
        result, error = None, None
        try:
            result = work()
        except (SharedError, Stopped):  # raised at a meeting inside `work`: the others know
            raise
        except Exception as found:  # whatever it is, the others must not wait for this process
            error = found
        self.idle()
        self.settle(error)
        return result  # type: ignore[return-value]  # an error has been raised by now

    def gather(self, parts: Parts, count: int) -> Tensor:
        """Values of all processes' items in one (count, ...) tensor, from (indices, values) parts of this one's.

        Numbers come as float64, pictures in [0, 1] as bytes.
        """
        like = parts[0][1] if parts else torch.zeros(1)
        dtype = torch.float64 if like.ndim == 1 else torch.uint8
        whole = torch.zeros(count, *like.shape[1:], device=self.accelerator.device, dtype=dtype)
        for indices, values in parts:
            whole[indices] = (values * 255).round().to(whole) if dtype == torch.uint8 else values.to(whole)
        if self.accelerator.num_processes == 1:
            return whole
        with self.timings.meeting():
            return self.accelerator.reduce(whole, "sum")

    def rounds(self, own: Iterable, do: Callable = lambda item: item) -> Iterator:
        """Yield what `do` makes of each of `own`, however many other processes have, all meeting after each."""
        items = list(own)
        for index in range(self.settle(count=len(items))):
            made = self.together(partial(do, items[index]) if index < len(items) else _nothing)
            if index < len(items):
                yield made
