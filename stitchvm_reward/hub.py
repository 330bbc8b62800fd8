"""Models by local folder or hub id."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from stitchvm_reward.errors import InputError


def is_hub_id(model: str) -> bool:
    """Return whether a name can only mean owner/name on the hub: it has that form and is not a local path."""
    return model.count("/") == 1 and not model.startswith((".", "~", "/")) and not Path(model).exists()


def locate(model: str, patterns: tuple[str, ...]) -> Path:
    """Return the local folder of a model given as a folder or a hub id, of which *.json and `patterns` are downloaded.

    Raises InputError if the folder is missing, if the hub cannot be reached, or if the model is gated or does not
    exist.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(model):
        raise InputError(f"model folder not found: {model}; give a folder or a hub id like owner/name")
    try:
        # Repositories may hold weights twice: as safetensors and as pickles, which are fetched only on request.
        ignored = ["*.fp16*"] if any(pattern.endswith(".bin") for pattern in patterns) else ["*.bin", "*.fp16*"]
        return Path(snapshot_download(model, allow_patterns=["*.json", *patterns], ignore_patterns=ignored))
    except GatedRepoError:
        raise InputError(
            f"{model} is gated: accept its licence at huggingface.co/{model}, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(f"{model} is neither a model on the hub nor a local folder; check the spelling") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{model} is neither a local folder nor in the hub cache, and the hub cannot be reached "
            f"({type(error).__name__}); download it first with `hf download {model}`"
        ) from None
