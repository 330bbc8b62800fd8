"""Processes that stop together: a signal to one of them, or a failure of one, is known to all at the same point."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FrameType
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from stitchvm_reward.errors import InputError, SharedError

Result = TypeVar("Result")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def _nothing() -> None:
    return None


class Stopped(Exception):
    """A signal asked the run to end; every process raises it at the same point."""


class Agreement:
    """What the processes tell each other between two pieces of work that need no communication."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.asked = accelerator, False

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 as the wish to stop at the next point; a second one ends the process at once."""
        for number in SIGNALS:
            signal.signal(number, self._ask)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # launch/slurm/rank.py holds back those that come earlier

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True

    def settle(self, error: Exception | None = None) -> None:
        """Meet all processes here; `error` is what went wrong on this one.

        Raises Stopped everywhere when any was asked to stop, and where any failed, that error there and SharedError
        with its message on the others.
        """
        if self.accelerator.num_processes == 1:
            asked, failed = int(self.asked), int(error is not None)
        else:
            mine = torch.tensor([int(self.asked), int(error is not None)], device=self.accelerator.device)
            asked, failed = self.accelerator.reduce(mine, "sum").tolist()
        if failed:
            told = [text for text in gather_object([None if error is None else str(error)]) if text is not None]
            if error is not None and not isinstance(error, InputError):
                raise error
            raise SharedError(told[0]) from error
        if asked:
            raise Stopped

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, once it is known that no process failed in it or was asked to stop."""
        result, error = None, None
        try:
            result = work()
        except Exception as found:  # whatever it is, the others must not wait for this process
            error = found
        self.settle(error)
        return result  # type: ignore[return-value]  # an error has been raised by now

    def rounds(self, own: Iterable, do: Callable, most: int) -> Iterator:
        """Yield what `do` makes of each of `own`, of which no process has more than `most`, all meeting after each."""
        items = list(own)
        for index in range(most):
            made = self.together(partial(do, items[index]) if index < len(items) else _nothing)
            if index < len(items):
                yield made

    def meet(self, own: Iterable) -> Iterator:
        """Yield each of `own`, however many other processes have, all meeting after each until the last is through."""
        items = list(own)
        most = len(items)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(torch.tensor([most], device=self.accelerator.device))
            most = int(counts.max())
        for index in range(most):
            if index < len(items):
                yield items[index]
            self.settle()
