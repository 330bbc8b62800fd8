"""Rewards that compare an image with its text, and the image tower, which the aesthetic reward uses too."""

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from stitchvm_reward.errors import InputError
from stitchvm_reward.hub import locate
from stitchvm_reward.rewards.preprocess import normalise, pad_to_square, resize_and_crop, squash

# How an image of any shape becomes the square that the tower reads, by the kind of reward.
FITS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "aesthetic": resize_and_crop,
    "clip": resize_and_crop,
    "dfn_clip": squash,
    "hpsv2": pad_to_square,
    "pickscore": resize_and_crop,
}
TEXT_KINDS = ("clip", "dfn_clip", "hpsv2", "pickscore")
PICKSCORE_DIVISOR = 26.0  # as in DiffusionNFT: it brings exp(logit_scale) * cosine, about 20, close to 1
WEIGHT_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def require_folder(model: str) -> None:
    """Raise InputError for a CLIP model given as a file of weights; the message says how to convert it to a folder."""
    if Path(model).suffix.lower() in WEIGHT_FILES and not Path(model).expanduser().is_dir():
        raise InputError(
            f"a reward's model must be a CLIP folder or a hub id, got the file {model}; convert open_clip weights "
            f"with: python -m stitchvm_reward.rewards.open_clip {model} OUT --tokenizer FOLDER_OR_HUB_ID"
        )


def load_clip(model: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[CLIPModel, Path]:
    """Load a frozen CLIP model; return it and its folder. Raises InputError if there is none.

    Some models are published without safetensors; their pytorch_model.bin is read as tensors only, never as code.
    """
    require_folder(model)
    folder = locate(model, ("*.safetensors", "*.txt"))
    safe = any(folder.glob("model*.safetensors"))
    if not safe:
        folder = locate(model, ("pytorch_model*.bin", "*.txt"))
    try:
        clip = CLIPModel.from_pretrained(folder, dtype=dtype, use_safetensors=safe, weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{model} is not a CLIP model folder: {reason}") from None
    return clip.to(device).eval().requires_grad_(False), folder


class ImageTower:
    """The frozen vision half of a CLIP model, which turns images into normalised embeddings.

    The kind of reward determines how images are fitted to the tower's square input.
    """

    def __init__(self, model: str, kind: str, device: torch.device, dtype: torch.dtype = torch.float32):
        self.fit = FITS[kind]
        self.clip, self.folder = load_clip(model, device, dtype)
        self.device, self.dtype = device, dtype
        self.side = self.clip.config.vision_config.image_size

    def pixels(self, images: Tensor) -> Tensor:
        """Return the tower's input for images (batch, 3, h, w) in [0, 1]: resized, normalised and in its dtype."""
        return normalise(self.fit(images.to(self.device, torch.float32), self.side)).to(self.dtype)

    def embed(self, images: Tensor) -> Tensor:
        """Return normalised embeddings (batch, width) float32 of images (batch, 3, h, w) in [0, 1]; differentiable."""
        embedded = self.clip.get_image_features(pixel_values=self.pixels(images)).pooler_output
        return F.normalize(embedded.float(), dim=-1)

    def states_and_embedding(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last states (batch, 1 + patches, width) before the final norm, and the embeddings; float32."""
        output = self.clip.vision_model(self.pixels(images))
        embedded = self.clip.visual_projection(output.pooler_output)
        return output.last_hidden_state.float(), F.normalize(embedded.float(), dim=-1)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the folder's tokenizer. Raises InputError if there is none: the library would silently build another."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise InputError(f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizer library raises bare exceptions for a damaged file
        raise InputError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from None


class TextTower:
    """The frozen text half of a CLIP model, which scores image embeddings against their texts.

    Each prompt is embedded once and cached.
    """

    def __init__(self, clip: CLIPModel, folder: Path, kind: str):
        self.clip, self.tokenizer = clip, load_tokenizer(folder)
        self.scale = float(clip.logit_scale.float().exp()) / PICKSCORE_DIVISOR if kind == "pickscore" else 1.0
        self._known: dict[str, Tensor] = {}

    def to(self, device: torch.device) -> None:
        """Move the tower to a device."""
        self.clip.to(device)
        self._known = {prompt: embedding.to(device) for prompt, embedding in self._known.items()}

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """Return normalised embeddings (len(prompts), width) float32."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if missing:
            limit = self.clip.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                missing, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            )
            embedded = self.clip.get_text_features(input_ids=tokens.input_ids.to(self.clip.device)).pooler_output
            self._known.update(zip(missing, F.normalize(embedded.float(), dim=-1), strict=True))
        return torch.stack([self._known[prompt] for prompt in prompts])

    def score(self, embeddings: Tensor, prompts: list[str]) -> Tensor:
        """Return scores (batch,) of normalised image embeddings (batch, width), each against its own prompt.

        The score is the cosine, in [-1, 1]. For PickScore it is multiplied by exp(logit_scale) / 26 (3.85 for the
        published weights), as in DiffusionNFT. Raises InputError unless there is one prompt per embedding.
        """
        if len(prompts) != len(embeddings):
            raise InputError(f"every image is scored against its own prompt, got {len(embeddings)} and {len(prompts)}")
        return (embeddings * self.embed(prompts).to(embeddings.device)).sum(-1) * self.scale


class ClipReward:
    """Scores images against their texts; see `TextTower.score`. `kind` is one of TEXT_KINDS.

    The model runs in `dtype`.
    """

    def __init__(self, model: str, kind: str, device: torch.device, dtype: torch.dtype = torch.float32):
        self.tower = ImageTower(model, kind, device, dtype)
        self.texts = TextTower(self.tower.clip, self.tower.folder, kind)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return scores (batch,) float32 of images (batch, 3, h, w) in [0, 1] and their prompts; differentiable."""
        return self.texts.score(self.tower.embed(images), prompts)
