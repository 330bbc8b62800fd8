"""How exactly a GPU computes: deterministic kernels, and the number format of float32 products."""

import os

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACE = ":4096:8"  # one of the two that cuBLAS documents as reproducible


def set_numerics(deterministic: bool, tf32: bool) -> None:
    """Set how this process computes from now on; call it before CUDA starts.

    `deterministic` selects kernels that give the same bits every time. An operation without one then raises a
    RuntimeError. Both fused attention kernels of torch (flash and
    memory-efficient) follow this setting in their backward passes, and cuDNN's is not used with it. `tf32` lets float32
    products and convolutions round their inputs to TF32 (10 bits of mantissa); it does not affect determinism.
    Raises RuntimeError where CUDA has started and it is too late to set cuBLAS's workspace.
    """
    if deterministic:
        if torch.cuda.is_initialized() and WORKSPACE not in os.environ:
            raise RuntimeError(f"deterministic kernels need {WORKSPACE} in the environment before CUDA starts")
        os.environ.setdefault(WORKSPACE, DETERMINISTIC_WORKSPACE)
        torch.backends.cudnn.benchmark = False
        # Filling new memory with NaN finds bugs, changes no result and costs a pass over every new tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
