"""Copies between the CPU and a GPU for which the CPU does not wait."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on `device`. The copy to a GPU goes through pinned memory and is only enqueued."""
    if device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class RunningMean:
    """The mean of all scores but the latest batch's, for a progress bar.

    A batch's sum is copied to the CPU behind the work that computes it, and read when the next batch is added: by then
    the device has work for at least one batch, so it never waits for the CPU.
    """

    def __init__(self):
        self.total, self.count = 0.0, 0
        self._coming: tuple[Tensor, int, torch.cuda.Event | None] | None = None

    def add(self, scores: Tensor) -> None:
        """Add a batch of scores, (batch,)."""
        self._arrive()
        total = scores.detach().sum().to("cpu", non_blocking=True)
        arrived = torch.cuda.Event() if scores.is_cuda else None
        if arrived is not None:
            arrived.record()
        self._coming = total, len(scores), arrived

    def _arrive(self) -> None:
        if self._coming is None:
            return
        total, count, arrived = self._coming
        if arrived is not None:
            arrived.synchronize()
        self.total, self.count = self.total + float(total), self.count + count

    def shown(self) -> dict[str, str]:
        """Return what a progress bar shows: nothing before the second batch."""
        return {"reward": f"{self.total / self.count:.3f}"} if self.count else {}
