"""What all commands share: quiet libraries, and exit code 2 with a one-line message for a user's mistake.

Import this before transformers and diffusers, which read their verbosity at import.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from stitchvm_reward.errors import InputError, SharedError

if TYPE_CHECKING:
    import torch

# Prompts are tokenized in short bursts; parallel tokenizers would only print warnings about forked processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The libraries print advice at every import.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# libgomp reads this when torch is imported. By its own default waiting threads spin for milliseconds, in each other's
# way where the cores are busy; this number is what it takes itself where it starts more threads than there are cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# PEFT imports it wherever it is installed, and on a CPU it reports kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def available_device() -> "torch.device":
    """Return the device of single-process commands: the GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add --trust-code to a command that runs what a recipe names; see `stitchvm_reward.runs.recipe.require_trust`."""
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="run code that a recipe outside the current folder names (package.module:name)",
    )


def hide_loading_bars() -> None:
    """Hide the libraries' progress bars for loading, which would clutter those of the run."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def run_command(run: Callable[[], int | None]) -> int:
    """Run a command and return its exit code: the result of `run` (0 for None), or 2 after printing an InputError.

    An operation without a deterministic kernel is reported like one, since it is the recipe that forbids it.
    """
    try:
        return run() or 0
    except (InputError, RuntimeError) as error:
        operation = _nondeterministic_operation(error)
        if operation is None and not isinstance(error, InputError):
            raise
        message = str(error)
        if operation is not None:
            message = (
                f"model.deterministic is on, and torch has no deterministic kernel for {operation}, which this run "
                "needs: set model.deterministic=false"
            )
        if not isinstance(error, SharedError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {message}", file=sys.stderr)
        return 2


def _nondeterministic_operation(error: BaseException | None) -> str | None:
    """Return the operation that torch refused for want of a deterministic kernel, from the error or its cause."""
    while error is not None:
        found = re.search(r"(\S+) does not have a deterministic implementation", str(error))
        if found and isinstance(error, RuntimeError):
            return found[1]
        error = error.__cause__
    return None
