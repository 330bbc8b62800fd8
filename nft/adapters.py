"""Low-rank adapters whose products run in their base's number format, on PEFT's modules and names.

PEFT's own forward casts activations to the adapters' float32, multiplies in float32 and casts back: at bfloat16 that
is 61% more memory traffic for 1% of the work. Here the small matrices are cast instead, and the large result is written
in place.
"""

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class Matrix(nn.Module):
    """One matrix of an adapter. It is a module so that ZeRO-3, whose hooks gather a module's parameters, sees its use.

    `weight` is the float32 master. `product`, where it is set, holds the same numbers in the base's format, for an
    adapter that does not train.
    """

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight
        self.product: Tensor | None = None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in `dtype`; gradients reach the master through a cast."""
        return self.weight.to(dtype) if self.product is None else self.product


class Down(Matrix):
    """A, (rank, in)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return x A^T, (samples, rank), of `inputs` (samples, in) in their dtype."""
        return F.linear(inputs, self.matrix(inputs.dtype))


class Up(Matrix):
    """B, (out, rank)."""

    def forward(self, low: Tensor, output: Tensor, scale: float) -> Tensor:
        """Return output + scale * low B^T, (samples, out), in the dtype of `low` and in place where that is legal."""
        matrix = self.matrix(low.dtype).t()
        if hasattr(self.weight, "ds_tensor"):  # ZeRO-3's hooks return views, which autograd keeps from being written
            return torch.addmm(output, low, matrix, alpha=scale)
        return output.addmm_(low, matrix, alpha=scale)


class AdaptedLinear(Linear):
    """PEFT's adapted linear layer, with y = W x + b + scale * B A x in the dtype of x.

    `active` holds the matrices of the adapter that it runs with, None for the base layer alone. It is a tuple, which
    does not register them a second time.
    """

    active: tuple[Down, Up] | None = None

    def update_layer(self, adapter_name: str, *arguments, **named) -> None:
        """Add an adapter as PEFT does."""
        super().update_layer(adapter_name, *arguments, **named)
        self.lora_A[adapter_name] = Down(self.lora_A[adapter_name].weight)
        self.lora_B[adapter_name] = Up(self.lora_B[adapter_name].weight)
        self.scale: float = self.scaling[adapter_name]

    def activate(self, adapter: str | None) -> None:
        """Run with one adapter from now on, or with none. PEFT's `set_adapter` would change requires_grad."""
        self.active = None if adapter is None else (self.lora_A[adapter], self.lora_B[adapter])

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., out) of `inputs` (..., in)."""
        # On a matrix, the base's product is not a view, and can be added to in place without a copy in its backward.
        flat = inputs.flatten(0, -2)
        output = self.base_layer(flat)
        if self.active is not None:
            down, up = self.active
            output = up(down(flat), output, self.scale)
        return output.view(*inputs.shape[:-1], output.shape[-1])
