"""Processes and devices: the accelerator, and a check that it sees what the launcher started."""

import importlib.util
import os
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from stitchvm_reward.errors import InputError

LAUNCHED = "ACCELERATE_DYNAMO_BACKEND"  # set by every launch of accelerate


def make_accelerator(timeout: float = 1800) -> Accelerator:
    """Return the accelerator of this process, in full precision: recipes choose number formats themselves.

    A single process on the CPU takes all of its cores, unless the user has chosen the number of threads.

    A collective fails one minute after `timeout` seconds, so that the watchdog reports first. Raises InputError if
    accelerate sees another number of processes than the launcher started: the processes would silently train separate
    policies.
    """
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout + 60))
    cpu = not torch.cuda.is_available()
    sharded = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if sharded and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            "this launch asks for DeepSpeed, which is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation "
            "deepspeed, or launch with launch/accelerate/ddp.yaml"
        )
    if sharded and cpu:
        _deepspeed_on_cpu(group)
    accelerator = Accelerator(cpu=cpu and not sharded, mixed_precision="no", kwargs_handlers=[group])
    if sharded:
        # Otherwise transformers would shard every model that it loads, including rewards and text encoders.
        unset_hf_deepspeed_config()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    asked = int(os.environ.get("ACCELERATE_NUM_PROCESSES", started))
    # `accelerate launch --cpu --num_processes 2` sets a rendezvous address and then starts a single process.
    lone = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if lone or not accelerator.num_processes == started == asked:
        several = "several" if lone else str(max(started, asked))
        raise InputError(
            f"{several} processes were requested but accelerate sees {accelerator.num_processes}; "
            "on CPUs run: torchrun --nproc-per-node N launch/nft.py RECIPE"
        )
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1 and not threads_chosen():
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return accelerator


def _deepspeed_on_cpu(group: InitProcessGroupKwargs) -> None:
    """Make DeepSpeed run on CPUs with gloo only.

    Its shared-memory operator would be compiled at first use, and a run that is killed meanwhile leaves a lock that
    blocks later runs.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    group.backend = "gloo"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def shutdown(accelerator: Accelerator) -> None:
    """Leave the process group at the end of a run, when nothing else refers to the run's network."""
    # A reducer that outlives the process group would free it, which may wait forever for a thread.
    accelerator.free_memory()
    accelerator.end_training()


def threads_chosen() -> bool:
    """Return whether the user has chosen the number of OpenMP threads.

    accelerate's launcher sets OMP_NUM_THREADS=1 where the user has set nothing, so what counts is the environment and
    the command line of the launcher itself: the nearest ancestor that does not have the launcher's variables.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    if os.environ["OMP_NUM_THREADS"] != "1" or LAUNCHED not in os.environ:
        return True
    try:
        for ancestor in psutil.Process().parents():
            environment = ancestor.environ()
            if LAUNCHED not in environment:
                asked = any(word.replace("-", "_").startswith("__num_cpu_threads") for word in ancestor.cmdline())
                return asked or "OMP_NUM_THREADS" in environment
    except psutil.Error:
        pass
    return True


def threads_line() -> str:
    """Return how many threads a process computes with on the CPU, and how they wait for each other."""
    spins = os.environ.get("GOMP_SPINCOUNT", "the default")
    waits = f"OMP_WAIT_POLICY {policy}" if (policy := os.environ.get("OMP_WAIT_POLICY")) else f"GOMP_SPINCOUNT {spins}"
    chosen = "as OMP_NUM_THREADS says" if threads_chosen() else "OMP_NUM_THREADS sets another number"
    cores = len(os.sched_getaffinity(0))
    return f"threads      {torch.get_num_threads()} per process on {cores} cores ({chosen}; {waits})"
