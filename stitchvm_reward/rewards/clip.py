"""CLIP similarity as a reward, and the image tower that other rewards share."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from stitchvm_reward.errors import InputError
from stitchvm_reward.hub import locate
from stitchvm_reward.rewards.preprocess import normalise, resize_and_crop


def load_clip(model: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[CLIPModel, Path]:
    """A frozen CLIP model and the folder it came from. Raises InputError where there is none."""
    folder = locate(model, ("*.safetensors", "*.txt"))
    try:
        clip = CLIPModel.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{model} is no CLIP model folder: {str(error).splitlines()[0]}") from None
    return clip.to(device).eval().requires_grad_(False), folder


class ImageTower:
    """The frozen vision half of a CLIP model: images to normalised embeddings."""

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype = torch.float32):
        self.clip, self.folder = load_clip(model, device, dtype)
        self.device, self.dtype = device, dtype
        self.side = self.clip.config.vision_config.image_size

    def pixels(self, images: Tensor) -> Tensor:
        """What the tower reads of (batch, 3, h, w) images in [0, 1]: its own size and normalisation, in its dtype."""
        return normalise(resize_and_crop(images.to(self.device, torch.float32), self.side)).to(self.dtype)

    def embed(self, images: Tensor) -> Tensor:
        """Normalised embeddings, (batch, width) float32, of (batch, 3, h, w) in [0, 1]; differentiable."""
        embedded = self.clip.get_image_features(pixel_values=self.pixels(images)).pooler_output
        return F.normalize(embedded.float(), dim=-1)

    def states_and_embedding(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Last states (batch, 1 + patches, width) before the final norm, and normalised embeddings; float32."""
        output = self.clip.vision_model(self.pixels(images))
        embedded = self.clip.visual_projection(output.pooler_output)
        return output.last_hidden_state.float(), F.normalize(embedded.float(), dim=-1)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The folder's own tokenizer. Without its files the library would make up another and say nothing."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise InputError(f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizer library raises bare exceptions for a damaged file
        raise InputError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from None


class TextTower:
    """The frozen text half of a CLIP model; each prompt is embedded once and kept."""

    def __init__(self, clip: CLIPModel, folder: Path):
        self.clip, self.tokenizer = clip, load_tokenizer(folder)
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """Normalised embeddings, (len(prompts), width) float32."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if missing:
            limit = self.clip.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                missing, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            )
            embedded = self.clip.get_text_features(input_ids=tokens.input_ids.to(self.clip.device)).pooler_output
            self._known.update(zip(missing, F.normalize(embedded.float(), dim=-1), strict=True))
        return torch.stack([self._known[prompt] for prompt in prompts])


class ClipReward:
    """Cosine of image and text embedding, in [-1, 1]."""

    def __init__(self, model: str, device: torch.device):
        self.tower = ImageTower(model, device)
        self.texts = TextTower(self.tower.clip, self.tower.folder)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(batch,) float32 for (batch, 3, h, w) images in [0, 1] and as many prompts; each text is embedded once."""
        return (self.tower.embed(images) * self.texts.embed(prompts)).sum(-1)
