"""The stitching layer: from a backbone's tokens to the tokens that a reward model's blocks expect."""

import torch.nn.functional as F
from torch import Tensor, nn


def resample(features: Tensor, side: int) -> Tensor:
    """Resample features (batch, width, h, w) bilinearly to a square grid."""
    if features.shape[-2:] == (side, side):
        return features
    return F.interpolate(features, (side, side), mode="bilinear", align_corners=False)


class StitchingLayer(nn.Module):
    """s(h) = y + G(y) with y = Up(F h) (Stitched Value Model, arXiv 2605.19804, section 4.1 and C.1).

    F is a 1x1 convolution that is initialised by the search's closed-form solution. Up resamples to the reward
    model's patch grid. G is SiLU, 1x1, SiLU, 1x1 with a bottleneck of one eighth, and starts at zero.
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
        """Initialise F with W, (width_in + 1, width_out), whose last row is the bias."""
        weight, bias = solution[:-1].T, solution[-1]
        self.linear.weight.data.copy_(weight[:, :, None, None])
        self.linear.bias.data.copy_(bias)  # type: ignore[union-attr]

    def forward(self, features: Tensor) -> Tensor:
        """Return (batch, width_out, side, side) of features (batch, width_in, h, w), in the layer's dtype.

        F runs before Up; the two commute.
        """
        stitched = resample(self.linear(features.to(self.linear.weight.dtype)), self.side)
        return stitched + self.residual(stitched)
