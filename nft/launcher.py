"""Processes and devices: what accelerate is asked for, and what it must have understood."""

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from stitchvm_reward.errors import InputError


def make_accelerator() -> Accelerator:
    """The accelerator of this process, in full precision: recipes choose number formats themselves.

    Raises InputError when accelerate sees another number of processes than the launcher started, which would
    silently train that many separate policies or one in place of several.
    """
    # Buffers never change here, so sending them around on every forward would be waste.
    options = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[options])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    asked = int(os.environ.get("ACCELERATE_NUM_PROCESSES", started))
    if accelerator.num_processes != started or asked != started:
        raise InputError(
            f"the launcher started {started} processes but accelerate sees {accelerator.num_processes}; "
            "on a CPU run: torchrun --nproc-per-node N launch/nft.py RECIPE"
        )
    return accelerator
