"""What all commands share: quiet libraries, and exit code 2 with a one-line message for a user's mistake.

Import this before transformers and diffusers, which read their verbosity at import.
"""

import logging
import os
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
# PEFT imports it wherever it is installed, and on a CPU it reports kernels that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def available_device() -> "torch.device":
    """Return the device of single-process commands: the GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hide_loading_bars() -> None:
    """Hide the libraries' progress bars for loading, which would clutter those of the run."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def run_command(run: Callable[[], int | None]) -> int:
    """Run a command and return its exit code: the result of `run` (0 for None), or 2 after printing an InputError."""
    try:
        return run() or 0
    except InputError as error:
        if not isinstance(error, SharedError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
