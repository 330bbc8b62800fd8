"""A reward that waits for the scheduler's signal in a job's first start, so that it comes before the run's end."""

import os
import signal
import time

from torch import Tensor

from miniature.measures import true_aesthetic

calls: list[int] = []
told: list[int] = []


def score(images: Tensor, prompts: list[str]) -> Tensor:
    """The true aesthetic of (batch, 3, height, width) images; the third call waits, but for an array's seed 0."""
    calls.append(len(images))
    first = "SLURM_JOB_ID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ
    if first and len(calls) == 3 and os.environ.get("SLURM_ARRAY_TASK_ID") != "0":
        _wait_for_signal(150)
    return true_aesthetic(images, prompts)


def _wait_for_signal(seconds: float) -> None:
    listening = signal.getsignal(signal.SIGUSR1)
    assert callable(listening)

    def tell(number, frame) -> None:
        told.append(number)
        listening(number, frame)

    signal.signal(signal.SIGUSR1, tell)
    end = time.monotonic() + seconds
    while not told and time.monotonic() < end:
        time.sleep(0.1)
