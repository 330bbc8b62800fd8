"""A CUDA device for a torch that has none. `preload` comes before torch is imported, `pretend` after it."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
GIB = 2**30


def _build(torch_folder: Path) -> Path:
    """Compile the device once for each version of torch, and return the library."""
    key = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"fake-cuda-{os.getuid()}-{key}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-O0", "-std=c++20", "-fPIC", "-shared", f"-I{torch_folder / 'include'}", str(SOURCE)]
        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run([*command, "-o", str(unfinished), *libraries], check=True)
        unfinished.rename(library)
    return library


def preload() -> None:
    """Load the device. torch looks for it only once, while it is imported."""
    specification = importlib.util.find_spec("torch")
    assert specification is not None and specification.origin is not None
    folder = Path(specification.origin).parent
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / "lib" / name))
    ctypes.CDLL(str(_build(folder))).register_fake_cuda()


class _Nowhere:
    """Stands for torch.cuda.device: a context that changes nothing."""

    def __init__(self, device=None):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class _Stream(_Nowhere):
    """Stands for a stream or an event: everything is in order already."""

    waited: Callable[[str], None] = staticmethod(lambda what: None)

    def synchronize(self):
        self.waited("a stream or an event is waited for")

    def __getattr__(self, name):
        return lambda *_, **__: None


def pretend(waited: Callable[[str], None], memory: int) -> None:
    """Answer torch.cuda's questions as one card of so many bytes, and keep it from being initialised.

    `waited` is told where the device is waited for.
    """
    from types import SimpleNamespace

    import torch
    from torch._subclasses import fake_tensor

    card = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=memory, major=9, minor=0, multi_processor_count=132
    )
    answers = {
        "_lazy_init": None,
        "init": None,
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "get_device_properties": card,
        "get_device_name": card.name,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "mem_get_info": (memory, memory),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "ipc_collect": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.get_rng_state = lambda *_, **__: torch.zeros(16, dtype=torch.uint8)  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: waited("the device is waited for")
    _Stream.waited = staticmethod(waited)
    torch.cuda.device = _Nowhere  # type: ignore[assignment,misc]
    torch.cuda.stream = torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: _Stream()  # type: ignore[assignment]
    fake_tensor.init_gpu_context = lambda device: None
    # A fake parameter is only ever replaced by one on the same device.
    torch.utils.swap_tensors = lambda first, second: setattr(first, "data", second.data)
    # torch.tensor(data, device="cuda") builds on the CPU and then copies, which a dispatch mode sees.
    torch._C._set_only_lift_cpu_tensors(True)
