"""Random numbers by address: (seed, stream, epoch, sample, ...), never by how many were drawn before.

So results do not depend on the number of processes, on a restart, or on an evaluation in between. Numbers are
drawn on the CPU: the same on every device.
"""

import numpy as np
import torch
from torch import Tensor

ROLLOUT, LEVELS, TRAINING, EVALUATION, PROMPTS, ADAPTERS, STOPS, AUDIT, SPLIT, ORDER, PROBE = range(11)
STEERING, RESAMPLING, MONTE_CARLO, GENERATION, CAPTIONS, REFERENCE, BOOTSTRAP, SDE, SDE_WINDOWS = range(11, 20)


def at(seed: int, *address: int) -> torch.Generator:
    """The generator that belongs to an address."""
    high, low = np.random.SeedSequence([seed, *address]).generate_state(2)
    return torch.Generator().manual_seed(int(high) << 31 | int(low) >> 1)


def noise(shape: tuple[int, ...], seed: int, stream: int, epoch: int, samples: list[int], *more: int) -> Tensor:
    """Standard normal noise, (len(samples), *shape) float32, each sample's own."""
    return torch.stack([torch.randn(shape, generator=at(seed, stream, epoch, n, *more)) for n in samples])
