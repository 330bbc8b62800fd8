"""Processes that stop together: a signal to one process, or its failure, is known to all of them at the same point."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from stitchvm_reward.errors import InputError, SharedError
from stitchvm_reward.runs.tracking import Timings, waiting_for
from stitchvm_reward.users_code import running

Item = TypeVar("Item")
Parts = list[tuple[list[int], Tensor]]
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOP_MARKER = "STITCH_NFT_STOP_MARKER"  # names a file that is written when a signal has ended a run


def _nothing() -> None:
    return None


def mark_stopped(message: str) -> None:
    """Tell a batch script that a signal ended the run: write the file that STITCH_NFT_STOP_MARKER names, if any."""
    if path := os.environ.get(STOP_MARKER):
        Path(path).write_text(f"{message}\n")


@contextmanager
def watchdog(timings: Timings, seconds: float, process: int) -> Iterator[None]:
    """End this process with an error when its work has not advanced for `seconds`.

    The error names the phase, and the user's code that is running, if any.

    A collective that waits for a process that hangs or has gone may never return, and cannot always be interrupted. A
    thread therefore watches the clock and ends the process.
    """
    done = threading.Event()
    timings.move()

    def watch() -> None:
        while not done.wait(min(1.0, seconds / 10)):
            if time.monotonic() - timings.moved > seconds:
                code, cause = running(), "another process hangs or has gone"
                place = f"phase {timings.current}" + (f", in {code}" if code else "")
                message = (
                    f"process {process} has not advanced for {seconds:g} s in {place}: "
                    f"{f'{code} hangs' if code else cause}, or a step takes longer than `timeout` allows; run again to "
                    "continue from the last checkpoint"
                )
                print(f"error: {message}", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


class Stopped(Exception):
    """A signal asked the run to end; every process raises it at the same point."""


class RankSync:
    """Keeps the processes of a run together between pieces of work that need no communication.

    `idle` is called before a sync: what a process does while others still work.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.timings = accelerator, Timings(waiting_for(accelerator.device))
        self.asked, self.stopped = False, False
        self.idle: Callable[[], None] = _nothing

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 as a request to stop at the next sync; a second signal ends the process at once."""
        for number in SIGNALS:
            signal.signal(number, self._ask)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # launch/slurm/rank.py holds back signals that come earlier

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True

    def sync(self, error: Exception | None = None, count: int = 0) -> int:
        """Wait for all processes here and return the largest `count` of them.

        `error` is what failed on this process. Raises Stopped on every process when any of them was asked to stop, but
        only once. Raises `error` where it happened and SharedError with its message on the other processes. All syncs
        are of one kind, so a process that failed meets the others at whichever sync they reach next.
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
            messages = gather_object([None if error is None else str(error)])
            if error is not None and not isinstance(error, InputError):
                raise error
            raise SharedError(next(message for message in messages if message is not None)) from error
        if asked and not self.stopped:
            self.stopped = True
            raise Stopped
        return most

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the body, then sync: no process continues before it is known that none failed or was asked to stop."""
        error = None
        try:
            yield
        except (SharedError, Stopped):  # raised by a sync in the body: the other processes know
            raise
        except Exception as failure:  # whatever it is, the other processes must not wait for this one
            error = failure
        self.idle()
        self.sync(error)

    def gather(self, parts: Parts, count: int) -> Tensor:
        """Return the values of all processes' items as one (count, ...) tensor.

        `parts` are (indices, values) of this process. Numbers are returned as float64, pictures in [0, 1] as bytes.
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

    def total(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place, and return it."""
        if self.accelerator.num_processes > 1:
            with self.timings.meeting():
                torch.distributed.all_reduce(tensor)
        return tensor

    def rounds(self, items: Iterable[Item]) -> Iterator[Item | None]:
        """Yield the items, and then None for as long as another process still has items.

        The body of the loop must sync once, for instance by `together`.
        """
        mine = list(items)
        for index in range(self.sync(count=len(mine))):
            yield mine[index] if index < len(mine) else None
