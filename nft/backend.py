"""How processes share the training of one network: data parallel, or a stage of DeepSpeed's ZeRO, by the same calls.

Without DeepSpeed every process holds the whole network, and the adapters' gradients are summed in one message at the
step. DDP is not used: it rebuilds its buckets after a run's first step, so a resumed run would add gradients in another
order than one that never stopped.

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
from stitchvm_reward.errors import InputError, SharedError
from stitchvm_reward.runs import checkpoint
from stitchvm_reward.runs.gradients import FlatGradients

MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_stage(accelerator: Accelerator) -> int:
    """Return the stage of ZeRO, 1 to 3, or 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else int(plugin.zero_stage)


class Backend:
    """A policy's network prepared for training, and its optimizer.

    `network` is what to call, `optimizer` the torch optimizer that holds the learning rate, and `stage` the stage of
    ZeRO, or 0 without DeepSpeed.
    """

    def __init__(self, accelerator: Accelerator, policy: Policy, train: OptimizationSettings):
        self.accelerator, self.train = accelerator, train
        self.parameters = list(policy.tensors("current").values())
        self.stage = zero_stage(accelerator)
        self.engine: Any = None
        self.network, self.optimizer = policy.network, make_optimizer(train, self.parameters)
        if self.stage:
            _configure(accelerator.state.deepspeed_plugin, train, sum(p.numel() for p in self.parameters))
            self.network, _ = accelerator.prepare(self.network, self.optimizer)
            self.engine = accelerator.deepspeed_engine_wrapped.engine
            self.optimizer = self.engine.optimizer.optimizer
        else:
            self.gradients = FlatGradients(self.parameters)

    def require_same_weights(self, step: int) -> None:
        """Raise SharedError where processes hold different weights or are at different optimizer steps.

        All processes call this together. Each loads the weights itself, so another version of a file on one machine
        would spoil the training without any other sign. Under ZeRO-3 a process holds its shards only, and all run with
        the same gathered weights.
        """
        if self.accelerator.num_processes == 1:
            return
        named = [] if self.stage == 3 else list(self.network.named_parameters())
        sums = torch.stack([torch.tensor(step, device=self.accelerator.device), *(_bits(p) for _, p in named)])
        extremes = torch.stack([sums, -sums])
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
        different = (extremes[0] != -extremes[1]).nonzero().flatten().tolist()
        if different:
            what = named[different[0] - 1][0].removeprefix("module.") if different[0] else "the optimizer step"
            raise SharedError(
                f"the processes do not start alike: {what} and {len(different) - 1} more differ. Give all machines the "
                "same model files and the same run folder"
            )

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Hold the passes of one optimizer step; gradients are reduced once, after the last of them."""
        if self.engine is None:
            yield
        else:
            with self.engine.coalesce_grad_reduction():
                yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; `step` sums them over processes."""
        if self.engine is None:
            loss.backward()
        else:
            self.engine.backward(loss * self.accelerator.num_processes)  # DeepSpeed averages

    def step(self) -> float | None:
        """Sum the gradients over processes, clip them, take a step and clear them.

        Returns their norm before clipping, or None where it is not finite: then nothing was applied on any process.
        """
        if self.engine is not None:
            self.engine.step()
            return None if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())
        self.gradients.reduce()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.train.max_gradient_norm))
        finite = norm < float("inf")
        if finite:
            self.optimizer.step()
        self.gradients.clear()
        return norm if finite else None

    def discard(self) -> None:
        """Clear the gradients without taking a step, on all processes together."""
        if self.engine is None:
            self.gradients.clear()
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


def _bits(parameter: Tensor) -> Tensor:
    """Return the sum of a tensor's bit patterns, int64: exact, and so the same in any order of summation."""
    whole = {2: torch.int16, 4: torch.int32}[parameter.element_size()]
    return parameter.detach().view(whole).sum(dtype=torch.int64)


def _configure(plugin: Any, train: OptimizationSettings, trained: int) -> None:
    """Configure DeepSpeed as the recipe says, for so many `trained` parameters.

    Raises InputError for what it cannot do.
    """
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
    # Gradients are reduced in one bucket of the adapters' size; DeepSpeed's own buffer has 500 million numbers.
    if config["zero_optimization"].get("reduce_bucket_size", "auto") == "auto":
        config["zero_optimization"]["reduce_bucket_size"] = trained
