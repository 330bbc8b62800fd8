"""Forward passes in step: under ZeRO-3 every process gathers a layer's shards when any of them runs that layer."""

from collections.abc import Callable
from typing import Any

import torch

from nft.policy import ADAPTERS, Policy
from stitchvm_reward.diffusion.generator import Generator

NAMES = (None, *ADAPTERS)


def _smallest(generator: Generator) -> dict[str, Any]:
    """The smallest forward pass of a generator's network."""
    config, device = generator.transformer.config, generator.device
    return {
        "hidden_states": torch.zeros(1, *generator.latent_shape, device=device, dtype=generator.dtype),
        "encoder_hidden_states": torch.zeros(1, 1, config.joint_attention_dim, device=device, dtype=generator.dtype),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim, device=device, dtype=generator.dtype),
        "timestep": torch.zeros(1, device=device),
        "return_dict": False,
    }


class LockStep:
    """Calls a sharded network; a process that has none left to make joins in those of the others by `idle`.

    Each pass begins with all processes saying which adapter they want to run: all that want one want the same.
    """

    def __init__(self, network: Callable[..., Any], policy: Policy, generator: Generator):
        self.network, self.policy, self.device = network, policy, generator.device
        self.inputs = _smallest(generator)

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
