"""Gradients that processes sum in one message."""

import torch
from torch import nn


class FlatGradients:
    """The gradients of `parameters`, of one dtype and device, as views of one `buffer`.

    Backward passes add to the views. One message then sums the buffer over processes, in the same order at every step
    of every run on so many processes; nothing is copied before or after it.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        sizes = [parameter.numel() for parameter in parameters]
        self.buffer = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        for parameter, part in zip(parameters, self.buffer.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    def reduce(self) -> None:
        """Sum the gradients over all processes, which call this together."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(self.buffer)

    def clear(self) -> None:
        """Set all gradients to zero."""
        self.buffer.zero_()
