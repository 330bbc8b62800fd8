"""What every command line here does: quiet libraries, and one line with exit code 2 for a user's mistake.

Import this before transformers or diffusers: they read their verbosity when they are imported.
"""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from stitchvm_reward.errors import InputError, SharedError

if TYPE_CHECKING:
    import torch

# Prompts are tokenized in short bursts between training; threads forked there only bring warnings.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The libraries advise on every import; a user's terminal is for the run.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def available_device() -> "torch.device":
    """What commands of one process compute on: the GPU where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hide_loading_bars() -> None:
    """Leave the progress bars to the run's own; those of loading are over before they are read."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def answer(run: Callable[[], int | None]) -> int:
    """The exit code of a command: what `run` returns (None is 0), or 2 with the mistake on standard error."""
    try:
        return run() or 0
    except InputError as error:
        if not isinstance(error, SharedError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
