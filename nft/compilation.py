"""Whether a run compiles its networks, and why."""

import os
import shutil
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from nft.config import PolicyModelRecipe


@dataclass(frozen=True)
class Compilation:
    """Whether torch.compile is used for the transformer's blocks and the value models' networks, and the reason."""

    on: bool
    reason: str

    def line(self) -> str:
        """Return the plan's line."""
        return f"compile      {'on' if self.on else 'off'}: {self.reason}"


def missing_tool() -> str | None:
    """Name what torch.compile needs on a GPU and this machine lacks: Triton builds its launchers with a C compiler."""
    if find_spec("triton") is None:
        return "Triton"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "a C compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h (the package python3-dev)"
    return None


def compilation(model: PolicyModelRecipe, device: torch.device, zero: int = 0) -> Compilation:
    """Decide whether networks on `device` are compiled under stage `zero` of ZeRO: as `model.compile` says, or where it
    is null, on a GPU that has what compiling needs."""
    if model.compile is not None:
        return Compilation(model.compile, f"model.compile is {str(model.compile).lower()}")
    if device.type != "cuda":
        return Compilation(False, "model.compile is null, which compiles on GPUs only")
    if zero == 3:
        return Compilation(False, "model.compile is null, and the hooks of ZeRO-3 would break the graphs")
    if model.deterministic:
        return Compilation(
            False, "model.compile is null, and which code is compiled depends on the batch sizes that come first"
        )
    if (missing := missing_tool()) is not None:
        return Compilation(False, f"model.compile is null, and {missing} is missing, which compiling needs")
    return Compilation(True, "model.compile is null, and the device is a GPU")


def compilation_here(model: PolicyModelRecipe) -> Compilation:
    """Decide for the device that a run on this machine would use, without ZeRO."""
    return compilation(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
