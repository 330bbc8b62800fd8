"""The stitching layer: from a backbone's tokens to the tokens a reward model's blocks expect."""

import torch.nn.functional as F
from torch import Tensor, nn


def resample(features: Tensor, side: int) -> Tensor:
    """Bilinear resampling of (batch, width, h, w) features onto a square grid."""
    if features.shape[-2:] == (side, side):
        return features
    return F.interpolate(features, (side, side), mode="bilinear", align_corners=False)


class StitchingLayer(nn.Module):
    """s(h) = y + G(y) with y = Up(F h) (Stitched Value Model, arXiv 2605.19804, section 4.1 and C.1).

    F is a 1x1 convolution that the search's closed-form solution initialises, Up resamples onto the reward model's
    patch grid, G is SiLU, 1x1, SiLU, 1x1 with a bottleneck of an eighth, and starts at zero.
    """

    def __init__(self, width_in: int, width_out: int, side: int):
        super().__init__()
        self.side = side
        self.linear = nn.Conv2d(width_in, width_out, 1)
        narrow = max(1, width_out // 8)
        last = nn.Conv2d(narrow, width_out, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.residual = nn.Sequential(nn.SiLU(), nn.Conv2d(width_out, narrow, 1), nn.SiLU(), last)

    def set_linear(self, solution: Tensor) -> None:
        """Initialise F with W, (width_in + 1, width_out): the last row is the bias."""
        weight, bias = solution[:-1].T, solution[-1]
        self.linear.weight.data.copy_(weight[:, :, None, None])
        self.linear.bias.data.copy_(bias)  # type: ignore[union-attr]

    def forward(self, features: Tensor) -> Tensor:
        """(batch, width_out, side, side) of (batch, width_in, h, w) in its dtype; F comes before Up, which commute."""
        stitched = resample(self.linear(features.to(self.linear.weight.dtype)), self.side)
        return stitched + self.residual(stitched)
