"""What networks read of prompts, encoded once for each distinct text and kept on disk."""

import gc
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import family_of
from stitchvm_reward.families.family import Conditions, Family
from stitchvm_reward.files import staged
from stitchvm_reward.hub import locate

IN_MEMORY = 2048  # prompts whose tensors are held in memory; the others are read from disk again


def fingerprint(folder: Path, parts: tuple[str, ...]) -> str:
    """Identify text encoders by their files in `folder`: names, sizes and contents (of large files, the beginning)."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((folder / part).glob("*")):
            with path.open("rb") as file:
                digest.update(f"{part}/{path.name}:{path.stat().st_size}:".encode() + file.read(1 << 20))
    return digest.hexdigest()


def load_text_pipeline(family: Family, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a pipeline's text encoders and tokenizers alone. Raises InputError where one is missing."""
    try:
        pipeline = family.pipeline.from_pretrained(
            folder, transformer=None, vae=None, dtype=dtype, use_safetensors=True, local_files_only=True
        ).to(device)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder} is not a complete {family.name} pipeline folder: {reason}") from None
    pipeline.set_progress_bar_config(disable=True)
    for part in family.text_parts:
        if isinstance(encoder := getattr(pipeline, part), torch.nn.Module):
            encoder.eval()
    return pipeline


class PromptCache:
    """Named tensors of prompts as safetensors files, one for each text.

    A file is named after the model's text encoders, the number of tokens, the number format and the text, so a run with
    any other of these never finds it. The text encoders are in memory only while `ensure` runs.
    """

    def __init__(self, model: ModelRecipe, folder: str, device: torch.device):
        self.family = family_of(model.path)
        self.model = locate(model.path, tuple(f"{part}/*" for part in self.family.text_parts))
        self.text_length, self.dtype, self.device = model.text_length, model.torch_dtype, device
        self.folder = Path(folder).expanduser()
        encoders = fingerprint(self.model, self.family.text_parts)
        self.key = hashlib.sha256(f"{encoders}|{self.text_length}|{self.dtype}".encode()).hexdigest()
        self._loaded: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def path(self, text: str) -> Path:
        """Return where the tensors of a text are kept."""
        name = hashlib.sha256(f"{self.key}|{text}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    @torch.no_grad()
    def ensure(
        self,
        texts: list[str],
        batch: int = 16,
        progress: Callable[[range], Iterable[int]] = iter,  # type: ignore[assignment]
    ) -> int:
        """Encode the texts that are not on disk yet and return how many there were. `progress` wraps the batches."""
        missing = [text for text in dict.fromkeys(texts) if not self.path(text).exists()]
        if not missing:
            # Other processes may have something to encode, and `progress` may be where they wait for each other.
            return len(list(progress(range(0))))
        pipeline = load_text_pipeline(self.family, self.model, self.dtype, self.device)
        for start in progress(range(0, len(missing), batch)):
            batch_texts = missing[start : start + batch]
            encoded = {
                name: tensor.cpu()
                for name, tensor in self.family.encode(pipeline, batch_texts, self.text_length).items()
            }
            for row, text in enumerate(batch_texts):
                with staged(self.path(text)) as file:
                    save_file({name: tensor[row].contiguous() for name, tensor in encoded.items()}, file)
        del pipeline
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return len(missing)

    def _read(self, text: str) -> dict[str, Tensor]:
        if text not in self._loaded:
            self._loaded[text] = load_file(self.path(text))
            if len(self._loaded) > IN_MEMORY:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(text)
        return self._loaded[text]

    def conditions(self, texts: list[str]) -> Conditions:
        """Return the conditions of texts that have been encoded, in order, on the device."""
        items = [self._read(text) for text in texts]
        return Conditions({name: torch.stack([item[name] for item in items]).to(self.device) for name in items[0]})
