"""How processes share the training of one network: DDP, or a stage of DeepSpeed's ZeRO, behind the same few calls.

Checkpoints are the same for all backends and any number of processes: what a backend shards is gathered when it is
saved and distributed anew when it is restored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nft.optimization import OptimizationSettings, make_optimizer
from nft.policy import Policy, local_part
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs import checkpoint

MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_stage(accelerator: Accelerator) -> int:
    """Return the stage of ZeRO, 1 to 3, or 0 for DDP and for one process."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else int(plugin.zero_stage)


class Backend:
    """A policy's network prepared for training, and its optimizer.

    `network` is what to call, `optimizer` the torch optimizer that holds the learning rate, and `stage` the stage of
    ZeRO, or 0 for DDP and one process.
    """

    def __init__(self, accelerator: Accelerator, policy: Policy, train: OptimizationSettings):
        self.accelerator, self.train = accelerator, train
        self.parameters = list(policy.tensors("current").values())
        self.stage = zero_stage(accelerator)
        if self.stage:
            _configure(accelerator.state.deepspeed_plugin, train)
        self.network, wrapped = accelerator.prepare(policy.network, make_optimizer(train, self.parameters))
        self.engine: Any = accelerator.deepspeed_engine_wrapped.engine if self.stage else None
        self.optimizer: torch.optim.Optimizer = self.engine.optimizer.optimizer if self.engine else wrapped.optimizer

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Hold the passes of one optimizer step; gradients are reduced once, by the last `backward` or at the end."""
        if self.engine is None:
            yield
        else:
            with self.engine.coalesce_grad_reduction():
                yield

    @contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        """Hold one forward and backward pass inside `accumulating`; `last` tells whether it is the step's last."""
        if self.engine is not None or last:
            yield
        else:
            with self.accelerator.no_sync(self.network):
                yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; they are averaged over processes."""
        if self.engine is None:
            self.accelerator.backward(loss)
        else:
            self.engine.backward(loss)

    def step(self) -> float | None:
        """Clip the gradients, take a step and clear them.

        Returns their norm before clipping, or None where it is not finite: then nothing was applied on any process.
        """
        if self.engine is not None:
            self.engine.step()
            return None if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.train.max_gradient_norm))
        finite = norm < float("inf")
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm if finite else None

    def discard(self) -> None:
        """Clear the gradients without taking a step, on all processes together."""
        if self.engine is None:
            self.optimizer.zero_grad(set_to_none=True)
            return
        # DeepSpeed drops gradients, with all that it keeps beside them, only when their norm is not finite.
        sharded: Any = self.engine.optimizer
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        infinite = torch.tensor(float("inf"), device=self.accelerator.device)
        setattr(sharded, name, lambda: [infinite] if self.stage == 3 else infinite)
        try:
            self.engine.step()
        finally:
            delattr(sharded, name)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return whole moments and step counts of all parameters, as `checkpoint.optimizer_tensors` does.

        All processes call this together.
        """
        if self.engine is None:
            return checkpoint.optimizer_tensors(self.optimizer)
        if not self.optimizer.state:
            return {}
        from deepspeed.utils import safe_get_full_optimizer_state

        step = torch.tensor(float(next(iter(self.optimizer.state.values()))["step"]))
        tensors = {}
        for index, parameter in enumerate(self.parameters):
            tensors[f"{index}.step"] = step.clone()
            for name in MOMENTS:
                tensors[f"{index}.{name}"] = safe_get_full_optimizer_state(parameter, name)
        return tensors

    def load(self, flat: dict[str, Tensor]) -> None:
        """Take over the parameters as they are now, and the optimizer state that `optimizer_tensors` returned.

        Raises InputError for the state of an optimizer that this backend cannot continue.
        """
        if self.engine is None:
            checkpoint.load_optimizer(self.optimizer, flat)
            return
        if flat and any(f"0.{name}" not in flat for name in (*MOMENTS, "step")):
            raise InputError(
                "the checkpoint's optimizer state is in 8 bits: continue without DeepSpeed, as the run was started"
            )
        sharded: Any = self.engine.optimizer
        sharded.refresh_fp32_params()
        partitions = (
            sharded.fp32_partitioned_groups_flat if self.stage == 3 else sharded.single_partition_of_fp32_groups
        )
        self.optimizer.state.clear()
        for partition in partitions if flat else ():
            # torch's AdamW counts steps in a tensor, DeepSpeed's AdamW for the CPU in a number.
            tensor = isinstance(self.optimizer, torch.optim.AdamW)
            step: Any = flat["0.step"].float().clone() if tensor else int(flat["0.step"])
            zeros = {name: torch.zeros_like(partition, requires_grad=False) for name in MOMENTS}
            self.optimizer.state[partition] = {"step": step} | zeros
        if flat:
            self._distribute(flat)

    def _distribute(self, flat: dict[str, Tensor]) -> None:
        """Give each process its part of the moments."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for index, parameter in enumerate(self.parameters):
            for name in MOMENTS:
                whole = flat[f"{index}.{name}"].to(self.accelerator.device)
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameter, local_part(whole, parameter), name)
                else:
                    safe_set_full_optimizer_state(parameter, whole, name)


def _configure(plugin: Any, train: OptimizationSettings) -> None:
    """Configure DeepSpeed as the recipe says. Raises InputError for what it cannot do."""
    if train.optimizer != "adamw":
        raise InputError(
            f"train.optimizer={train.optimizer} and DeepSpeed exclude each other: ZeRO shards adamw's moments; set "
            "train.optimizer=adamw, or launch without DeepSpeed"
        )
    config = plugin.deepspeed_config
    # The recipe's geometry cuts batches; DeepSpeed only needs a number here.
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = 1
    config["gradient_clipping"] = train.max_gradient_norm
    # Every sharded parameter lives in its shard alone, with no second copy to keep consistent.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
