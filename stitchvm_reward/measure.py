"""Measurements of single calls: FLOPs, time and peak memory, and a description of the machine they were made on."""

import math
import platform
import subprocess
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

WARM_UPS = 5  # calls at most before the timed ones


@contextmanager
def fused_attention() -> Iterator[None]:
    """Run attention on the meta device as the fused kernel that real devices run.

    By default, the meta device takes the unfused path, which materialises all attention scores. The function itself is
    replaced: a mode would be forgotten where a checkpointed block runs again in the backward pass.
    """
    unfused = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Tensor:
        if query.device.type != "meta":
            return unfused(query, key, value, *others, **named)
        scale = named.get("scale")
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)[0]

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = unfused


def _attention(query: Any, key: Any, value: Any, *_, out_shape: Any = None, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_, out_shape: Any = None, **__) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def flop_counter() -> FlopCounterMode:
    """Return torch's FLOP counter, extended by the CPU's attention kernel, which it does not count by default."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={attention: _attention, backward: _attention_backward})


def _uncompiled() -> Any:
    """Return a context for dispatch modes: code that the compiler first meets under one would never be compiled."""
    return torch.compiler.set_stance("force_eager")


def flops(call: Callable[[], Any]) -> float:
    """Return the floating-point operations of one call; a multiply-add counts as two.

    On the meta device, operations are counted but not computed. Compiled code is counted as it runs uncompiled.
    """
    counter = flop_counter()
    with _uncompiled(), counter:
        call()
    return float(counter.get_total_flops())


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    return counters["stats"]["unique_graphs"]


def compiled_regions(call: Callable[[], Any]) -> int:
    """Return how many compiled regions one call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        call()
    return sum(event.name.startswith("Torch-Compiled Region") for event in profile.events())


def _warm_up(call: Callable[[], Any]) -> None:
    """Call at least once, and until the compiler has nothing left to do."""
    for _ in range(WARM_UPS):
        before = compiled_graphs()
        call()
        if compiled_graphs() == before:
            return
    raise RuntimeError(f"torch.compile still makes new graphs in call {WARM_UPS} with equal inputs")


def timed(
    call: Callable[[], Any], samples: int, device: torch.device, repeats: int, *, compiled: bool = False
) -> dict[str, float | None]:
    """Return the cost of a call: median milliseconds and GFLOP per sample and, on a GPU, the peak MiB.

    Warm-up calls precede the `repeats` timed calls. With `compiled`, the result also has `compiled_regions`, the number
    of compiled regions that a call runs. Raises RuntimeError if there are none, and if a timed call compiles anything.
    """
    cuda = device.type == "cuda"
    _warm_up(call)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    times, graphs = [], compiled_graphs()
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else None
    if compiled_graphs() != graphs:
        raise RuntimeError(f"torch.compile made {compiled_graphs() - graphs} new graphs in the timed calls")
    cost: dict[str, float | None] = {
        "milliseconds": sorted(times)[repeats // 2] / samples * 1e3,
        "gigaflop": flops(call) / samples / 1e9,
        "peak_mib": peak,
    }
    if compiled:
        cost["compiled_regions"] = regions = compiled_regions(call)
        if not regions:
            raise RuntimeError("nothing compiled ran in a call that was to be timed compiled")
    return cost


class Traffic(TorchDispatchMode):
    """Counts, operation by operation, the bytes read and written, and the FLOPs of float32 matrix products.

    Views cost nothing, a broadcast dimension counts once, and attention counts its inputs and its result. It is an
    upper bound for compiled code, which keeps the results of fused operations in registers.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.float32_flops = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if function.is_view or function in _FREE:
            return result
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        read = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
        self.bytes += sum(_bytes(tensor) for tensor in (*read, *written))
        packet = function.overloadpacket
        if packet in _PRODUCTS and written[0].dtype == torch.float32:
            self.float32_flops += flop_registry[packet](*arguments, **(named or {}), out_val=result)
        return result


_FREE = {torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default, torch.ops.aten.empty.memory_format}
_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}


def _bytes(tensor: Tensor) -> int:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * tensor.element_size()


class _Live(TorchDispatchMode):
    """Adds up the sizes of the storages that operations create, for as long as they are alive."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        def storages(tree: Any) -> dict[int, Any]:
            tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
            return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}

        old = storages((arguments, named))
        result = function(*arguments, **(named or {}))
        if any(returned.alias_info for returned in function._schema.returns):
            return result  # a view, or what was written to
        for key, storage in storages(result).items():
            if key not in old and key not in self.seen:
                self.seen.add(key)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.bytes -= size


def peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """Return the peak MiB of the tensors that a call creates; on a GPU, of everything it allocates.

    Memory that was allocated before the call does not count. On a CPU, the workspace of single kernels is not seen.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return peak_of_created(call) / 2**20


def peak_of_created(call: Callable[[], Any]) -> int:
    """Return the peak bytes of the tensors that a call creates; they may be fake."""
    with _uncompiled(), _Live() as live:
        call()
    return live.peak


def machine(device: torch.device) -> dict[str, Any]:
    """Return the device, the number of threads, the commit and the library versions of a measurement."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    versions = {library.__name__: library.__version__ for library in (torch, diffusers, transformers, peft)}
    return {"device": name, "threads": torch.get_num_threads(), "commit": _commit()} | versions


def _commit() -> str:
    """Return the repository's commit, marked where files differ from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip()
