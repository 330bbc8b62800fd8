"""Measures of the miniature that are defined elsewhere equal what their definition gives by hand."""

import pytest
import torch

from miniature import measures


def picture(left: tuple[float, float, float], right: tuple[float, float, float]) -> torch.Tensor:
    """An image (1, 3, 4, 4) of two colours side by side."""
    halves = [torch.tensor(colour)[:, None, None].expand(3, 4, 2) for colour in (left, right)]
    return torch.cat(halves, dim=2)[None]


def test_grey_has_no_colour():
    assert float(measures.colourfulness(picture((0.2,) * 3, (0.9,) * 3), [""])) == pytest.approx(0, abs=1e-4)


def test_colourfulness_of_one_colour_is_its_distance_from_grey():
    # Pure red: red - green is 255, (red + green) / 2 - blue is 127.5, and nothing varies.
    expected = 0.3 * (255**2 + 127.5**2) ** 0.5
    assert float(measures.colourfulness(picture((1, 0, 0), (1, 0, 0)), [""])) == pytest.approx(expected, rel=1e-5)


def test_colourfulness_of_two_colours_counts_their_spread():
    # Red beside cyan: the means are 0, the deviations 255 and 127.5.
    expected = (255**2 + 127.5**2) ** 0.5
    assert float(measures.colourfulness(picture((1, 0, 0), (0, 1, 1)), [""])) == pytest.approx(expected, rel=1e-5)
