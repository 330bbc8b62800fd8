"""The aesthetic predictor: a small head on normalised CLIP image embeddings."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stitchvm_reward.errors import InputError
from stitchvm_reward.hub import locate
from stitchvm_reward.rewards.clip import ImageTower

FILES = ("model.safetensors", "aesthetic-model.pth")


class AestheticHead(nn.Module):
    """Linear layers width-1024-128-64-16-1 with dropout and without activations, as published (sac+logos+ava1)."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.layers(embeddings)[:, 0]


def load_head(model: str) -> AestheticHead:
    """Load a head from a file, a folder or a hub id; tensors only, never code. Raises InputError if that fails."""
    path = Path(model).expanduser()
    if not path.is_file():
        folder = locate(model, FILES)
        files = [folder / name for name in FILES if (folder / name).is_file()]
        if not files:
            raise InputError(f"no aesthetic head in {model}: expected one of {', '.join(FILES)}")
        path = files[0]
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        if not isinstance(tensors, dict):
            raise TypeError(f"the file contains a {type(tensors).__name__}, not named tensors")
        head = AestheticHead(tensors["layers.0.weight"].shape[1])
        head.load_state_dict(tensors)
    except (RuntimeError, LookupError, TypeError, AttributeError, EOFError, SafetensorError, UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{path} is not an aesthetic head (keys layers.0, .2, .4, .6, .7): {reason}") from None
    return head.float().eval().requires_grad_(False)


class AestheticReward:
    """The predicted aesthetic score, about 1 to 10; prompts are ignored. The CLIP model runs in `dtype`."""

    def __init__(self, model: str, head: str, device: torch.device, dtype: torch.dtype = torch.float32):
        self.head = load_head(head).to(device)
        self.tower = ImageTower(model, "aesthetic", device, dtype)
        width = self.head.layers[0].in_features
        if width != self.tower.clip.config.projection_dim:
            raise InputError(
                f"the aesthetic head reads embeddings of width {width}, {model} gives "
                f"{self.tower.clip.config.projection_dim}; use the CLIP model the head was trained on"
            )

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return scores (batch,) float32 of images (batch, 3, h, w) in [0, 1]; differentiable."""
        return self.head(self.tower.embed(images))
