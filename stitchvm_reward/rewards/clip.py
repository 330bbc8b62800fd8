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


class ImageTower:
    """The frozen vision half of a CLIP model: images to normalised embeddings."""

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype = torch.float32):
        folder = locate(model, ("*.safetensors", "*.txt"))
        try:
            clip = CLIPModel.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{model} is no CLIP model folder: {str(error).splitlines()[0]}") from None
        self.clip = clip.to(device).eval().requires_grad_(False)
        self.folder, self.device, self.dtype = folder, device, dtype
        self.side = self.clip.config.vision_config.image_size

    def embed(self, images: Tensor) -> Tensor:
        """Normalised embeddings, (batch, width) float32, of (batch, 3, h, w) in [0, 1]; differentiable."""
        pixels = normalise(resize_and_crop(images.to(self.device, torch.float32), self.side))
        embedded = self.clip.get_image_features(pixel_values=pixels.to(self.dtype)).pooler_output
        return F.normalize(embedded.float(), dim=-1)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The folder's own tokenizer. Without its files the library would make up another and say nothing."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise InputError(f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizer library raises bare exceptions for a damaged file
        raise InputError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from None


class ClipReward:
    """Cosine of image and text embedding, in [-1, 1]."""

    def __init__(self, model: str, device: torch.device):
        self.tower = ImageTower(model, device)
        self.tokenizer = load_tokenizer(self.tower.folder)
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def _embed_texts(self, prompts: list[str]) -> None:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if missing:
            limit = self.tower.clip.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                missing, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            )
            ids = tokens.input_ids.to(self.tower.device)
            embedded = F.normalize(self.tower.clip.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)
            self._texts.update(zip(missing, embedded, strict=True))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(batch,) float32 for (batch, 3, h, w) images in [0, 1] and as many prompts; each text is embedded once."""
        self._embed_texts(prompts)
        texts = torch.stack([self._texts[prompt] for prompt in prompts])
        return (self.tower.embed(images) * texts).sum(-1)
