"""Forward passes under ZeRO-3, where every process gathers a layer's shards when any of them runs that layer."""

from collections.abc import Callable
from typing import Any

import torch

from nft.policy import ADAPTERS, Policy
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.families.family import Conditions

NAMES = (None, *ADAPTERS)


class ZeroForward:
    """Calls a sharded network; a process that has no pass left to make joins those of the others by `idle`.

    Each pass begins with all processes saying which adapter they want to run: all that want one want the same.
    """

    def __init__(self, network: Callable[..., Any], policy: Policy, generator: Generator, conditions: Conditions):
        self.network, self.policy, self.device = network, policy, generator.device
        latents = torch.zeros(1, *generator.latent_shape, device=generator.device, dtype=generator.dtype)
        sigma = torch.zeros(1, device=generator.device)
        self.inputs = generator.family.inputs(latents, sigma, conditions, generator.guidance)

    def _say(self, wanted: int) -> int:
        said = torch.tensor([wanted], device=self.device)
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
        return int(said)

    def __call__(self, **inputs: Any) -> Any:
        self._say(1 + NAMES.index(self.policy.active))
        return self.network(**inputs)

    @torch.no_grad()
    def idle(self) -> None:
        """Take part in the other processes' passes until none has any left."""
        while wanted := self._say(0):
            with self.policy.using(NAMES[wanted - 1]):
                self.network(**self.inputs)
