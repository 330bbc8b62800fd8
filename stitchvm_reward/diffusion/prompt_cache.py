"""What networks read of prompts, encoded once for each distinct text and kept on disk."""

import gc
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stitchvm_reward.cache_folder import cached_file, mark_used
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import architecture_of
from stitchvm_reward.families.family import Conditions, Family
from stitchvm_reward.files import staged
from stitchvm_reward.hub import locate
from stitchvm_reward.transfer import to_device

BATCH = 16  # texts that are encoded together
FORMAT = 2  # of the files; those of another format are never found
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
IN_MEMORY = 2048  # prompts whose tensors are held in memory; the others are read from disk again


def fingerprint(folder: Path, parts: tuple[str, ...]) -> str:
    """Identify text encoders by their files in `folder`: names, sizes and contents (of large files, the beginning)."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((folder / part).glob("*")):
            with path.open("rb") as file:
                digest.update(f"{part}/{path.name}:{path.stat().st_size}:".encode() + file.read(1 << 20))
    return digest.hexdigest()


def require_text_parts(family: Family, folder: Path) -> None:
    """Raise InputError for a pipeline folder that lacks a text encoder, or the vocabulary of a tokenizer.

    transformers makes up a tokenizer where the files of one are missing.
    """
    for part in family.text_parts:
        if not (folder / part).is_dir():
            raise InputError(f"{folder} lacks {part}; a model folder must have {', '.join(family.text_parts)}")
        if part.startswith("tokenizer") and not any((folder / part / name).is_file() for name in VOCABULARIES):
            raise InputError(f"{folder}/{part} must hold a vocabulary, one of {', '.join(VOCABULARIES)}; it holds none")


def load_text_pipeline(family: Family, folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a pipeline's text encoders and tokenizers alone. Raises InputError where one is missing."""
    require_text_parts(family, folder)
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


def bytes_per_prompt(model: ModelRecipe) -> int:
    """Return the bytes of one prompt's tensors in the cache, from shapes. Raises InputError for an unknown model."""
    architecture = architecture_of(model.path)
    with torch.device("meta"):
        whole = architecture.family.stand_in(architecture, 1, model.text_length)
    kept = architecture.family.kept(architecture, whole.tensors)
    return sum(tensor.numel() for tensor in kept.values()) * model.torch_dtype.itemsize


class PromptCache:
    """Named tensors of prompts as safetensors files, one for each text, in the number format of the text encoders.

    A file is named after the model's text encoders, the number of tokens, the number format and the text, so a run with
    any other of these never finds it. The text encoders are in memory only while prompts are encoded. Other runs may
    use the folder too, and remove files to make room for theirs: what is missing is encoded again.
    """

    def __init__(self, model: ModelRecipe, folder: str, device: torch.device):
        self.architecture = architecture_of(model.path)
        self.family = self.architecture.family
        self.model = locate(model.path, tuple(f"{part}/*" for part in self.family.text_parts))
        require_text_parts(self.family, self.model)
        self.text_length, self.dtype, self.device = model.text_length, model.torch_dtype, device
        self.folder = Path(folder).expanduser()
        encoders = fingerprint(self.model, self.family.text_parts)
        self.key = hashlib.sha256(f"{encoders}|{self.text_length}|{self.dtype}".encode()).hexdigest()
        self._loaded: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def path(self, text: str) -> Path:
        """Return where the tensors of a text are kept."""
        return cached_file(self.folder, hashlib.sha256(f"{FORMAT}|{self.key}|{text}".encode()).hexdigest())

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Return the distinct texts that are not on disk; the files of the others count as used now."""
        return [text for text in dict.fromkeys(texts) if not mark_used(self.path(text))]

    @torch.no_grad()
    def ensure(
        self,
        texts: Iterable[str],
        progress: Callable[[range], Iterable[int]] = iter,  # type: ignore[assignment]
    ) -> int:
        """Encode the texts that are not on disk yet and return how many there were. `progress` wraps the batches.

        Raises InputError where the text encoders cannot be loaded, or the folder cannot be written.
        """
        missing = self.missing(texts)
        if not missing:
            # Other processes may have something to encode, and `progress` may be where they wait for each other.
            return len(list(progress(range(0))))
        pipeline = load_text_pipeline(self.family, self.model, self.dtype, self.device)
        for start in progress(range(0, len(missing), BATCH)):
            batch = missing[start : start + BATCH]
            # The last bit depends on the size of a batch. It is always the same, so that a text's tensors do not depend
            # on which others are encoded, and by which process.
            whole = self.family.encode(pipeline, batch + batch[-1:] * (BATCH - len(batch)), self.text_length)
            encoded = {name: tensor.cpu() for name, tensor in self.family.kept(self.architecture, whole).items()}
            for row, text in enumerate(batch):
                self._write(text, {name: tensor[row].contiguous() for name, tensor in encoded.items()})
        del pipeline
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return len(missing)

    def _write(self, text: str, tensors: dict[str, Tensor]) -> None:
        try:
            with staged(self.path(text)) as file:
                save_file(tensors, file)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write the prompt cache {self.folder}: {' '.join(str(error).split())}") from None

    def _read(self, text: str) -> dict[str, Tensor]:
        if text not in self._loaded:
            try:
                self._loaded[text] = load_file(self.path(text))
            except FileNotFoundError:  # removed by another run this very moment
                self.ensure([text])
                self._loaded[text] = load_file(self.path(text))
            if len(self._loaded) > IN_MEMORY:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(text)
        return self._loaded[text]

    def conditions(self, texts: list[str]) -> Conditions:
        """Return the conditions of texts, in order, on the device.

        They should have been encoded: texts that are not on disk are encoded here, which loads the text encoders.
        """
        self.ensure(text for text in texts if text not in self._loaded)
        items = [self._read(text) for text in texts]
        stacked = {name: to_device(torch.stack([item[name] for item in items]), self.device) for name in items[0]}
        return Conditions(self.family.restored(stacked))
