"""Stage 1: which backbone block fits which reward block, by closed-form least squares (Stitched Value Model, 4.1).

Every fit is solved by normal equations, whose float64 sums are gathered on the device and over all processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.runs.pictures import save_figure
from stitchvm_reward.stitching.layer import resample

MOST_CONDITION = 1e12  # of a Gram matrix with a unit diagonal; beyond it, its weakest directions are rounding errors


class Moments:
    """Sums over images of what least squares needs of their features on the reward model's patch grid, float64.

    `widths` are those of the backbone blocks' outputs, `target_widths` those of the reward blocks' inputs, by block.
    Targets of all reward blocks lie side by side. Memory is that of (width, width + all target widths) per block.
    """

    def __init__(self, widths: dict[int, int], target_widths: dict[int, int], patches: int, device: torch.device):
        self.widths, self.target_widths, whole = widths, target_widths, sum(target_widths.values())

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.images = zeros(1)
        self.gram = {i: zeros(width, width) for i, width in widths.items()}
        self.cross = {i: zeros(width, whole) for i, width in widths.items()}
        self.sums = {i: zeros(patches, width) for i, width in widths.items()}
        self.target_sums, self.target_squares = zeros(patches, whole), zeros(whole)
        self.class_sums = {j: zeros(width) for j, width in target_widths.items()}

    def tensors(self) -> list[Tensor]:
        """Return all sums, in a fixed order: what processes add up."""
        tables = (self.gram, self.cross, self.sums, self.class_sums)
        return [self.images, self.target_sums, self.target_squares, *(t for table in tables for t in table.values())]

    def add(self, backbone: dict[int, Tensor], reward: dict[int, Tensor], class_states: dict[int, Tensor]) -> None:
        """Add some images.

        `backbone` maps block i to its output (images, patches, width_i) for noisy latents. `reward` maps block j to its
        input (images, patches, width_j) for the clean images, `class_states` to the class token there (j > 1).
        """
        targets = torch.cat([reward[j].double() for j in self.target_widths], dim=-1)
        self.images += len(targets)
        self.target_sums += targets.sum(0)
        self.target_squares += targets.square().sum((0, 1))
        for j, state in class_states.items():
            self.class_sums[j] += state.double().sum(0)
        for i, output in backbone.items():
            features = output.double()
            self.sums[i] += features.sum(0)
            rows = features.flatten(0, 1)
            self.gram[i].addmm_(rows.T, rows)
            self.cross[i].addmm_(rows.T, targets.flatten(0, 1))

    def plus(self, other: "Moments") -> "Moments":
        """Return the sums over the images of both."""
        patches, device = len(self.target_sums), self.images.device
        whole = Moments(self.widths, self.target_widths, patches, device)
        for total, first, second in zip(whole.tensors(), self.tensors(), other.tensors(), strict=True):
            total.copy_(first + second)
        return whole

    @property
    def rows(self) -> Tensor:
        """The number of positions in all images."""
        return self.images * len(self.target_sums)

    def about(self, block: int, mean: Tensor, target_mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Gram matrix, cross products and squared targets of what is left after subtracting two means."""
        sums, target_sums = self.sums[block].sum(0), self.target_sums.sum(0)
        gram = self.gram[block] - torch.outer(sums, mean) - torch.outer(mean, sums - self.rows * mean)
        cross = self.cross[block] - torch.outer(sums, target_mean)
        cross -= torch.outer(mean, target_sums - self.rows * target_mean)
        squares = self.target_squares - 2 * target_sums * target_mean + self.rows * target_mean.square()
        return gram, cross, squares

    def columns(self, reward_block: int) -> slice:
        """Return the place of a reward block among the targets."""
        before = sum(width for j, width in self.target_widths.items() if j < reward_block)
        return slice(before, before + self.target_widths[reward_block])


@dataclass(frozen=True)
class Solution:
    """Weights (width, target width) float64, and the number of directions of the features that they use."""

    weights: Tensor
    rank: int


def solve(gram: Tensor, cross: Tensor) -> Solution:
    """Solve the normal equations `gram` W = `cross`, float64, of features (width) and targets (target width).

    By Cholesky factorisation, once the features have one scale. Where the features are nearly dependent, only
    directions whose eigenvalue exceeds 1 / MOST_CONDITION of the largest are used, with the smallest W.
    """
    scale = gram.diagonal().clamp_min(0).rsqrt().nan_to_num(posinf=0.0)  # a feature that is always zero has no weight
    equal, scaled = gram * scale * scale[:, None], cross * scale[:, None]
    factor, failed = torch.linalg.cholesky_ex(equal)
    if not failed:
        condition = torch.linalg.matrix_norm(equal, 1) * torch.linalg.matrix_norm(torch.cholesky_inverse(factor), 1)
        if condition < MOST_CONDITION:
            return Solution(torch.cholesky_solve(scaled, factor) * scale[:, None], len(gram))
    values, vectors = torch.linalg.eigh(equal)
    kept = values > values[-1] / MOST_CONDITION
    basis = vectors[:, kept]
    weights = basis @ ((basis.T @ scaled) / values[kept, None])
    return Solution(weights * scale[:, None], int(kept.sum()))


@dataclass(frozen=True)
class Search:
    """Mean squared residuals of pairs (i, j) on the fitted and on the held-out images; variance of the targets by j.

    `used` counts the directions of each block's features that its fits use, of `widths`.
    """

    blocks: list[int]
    reward_blocks: list[int]
    fit: Tensor
    held_out: Tensor
    variance: Tensor
    used: list[int]
    widths: list[int]

    def best(self, blocks: list[int] | None = None, reward_blocks: list[int] | None = None) -> tuple[int, int]:
        """Return the pair (i, j) with the smallest held-out residual; block 0, the latent itself, only on request."""
        rows = [i for i in self.blocks if i in (blocks or [b for b in self.blocks if b > 0])]
        columns = [j for j in self.reward_blocks if j in (reward_blocks or self.reward_blocks)]
        residual = {
            (i, j): float(self.held_out[self.blocks.index(i), self.reward_blocks.index(j)])
            for i in rows
            for j in columns
        }
        return min(residual, key=residual.__getitem__)

    def table(self) -> list[dict[str, float]]:
        """Return one row per pair: block, reward_block, fit, held_out, unexplained (share of the targets' variance),
        used (directions of the features) and width."""
        return [
            {
                "block": i,
                "reward_block": j,
                "fit": float(self.fit[row, column]),
                "held_out": float(self.held_out[row, column]),
                "unexplained": float(self.held_out[row, column] / self.variance[column]),
                "used": self.used[row],
                "width": self.widths[row],
            }
            for row, i in enumerate(self.blocks)
            for column, j in enumerate(self.reward_blocks)
        ]

    def dependent(self) -> list[str]:
        """Return one line for each block whose features are nearly dependent, so that its fits leave some out."""
        return [
            f"block {block}: features are nearly dependent, {used} of {width} directions are used"
            for block, used, width in zip(self.blocks, self.used, self.widths, strict=True)
            if used < width
        ]


@torch.no_grad()
def backbone_features(
    head: BackboneHead, latents: Tensor, sigma: Tensor, conditions: Conditions, *, blocks: list[int], side: int
) -> dict[int, Tensor]:
    """Return the features after each of `blocks` on a side x side grid, (batch, patches, width), on the device."""
    features = head.features(latents, sigma, conditions, blocks)
    return {i: resample(h, side).flatten(2).transpose(1, 2) for i, h in features.items()}


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def search(
    fitted: Moments,
    held_out: Moments,
    mine: Sequence[int] | None = None,
    total: Callable[[Tensor], Tensor] = _unchanged,
) -> Search:
    """Fit every pair on the images of `fitted` and measure it on those and on the images of `held_out`, in float64.

    A process solves the blocks `mine` (default: all), and `total` sums a tensor over the processes.
    """
    blocks, reward_blocks = list(fitted.widths), list(fitted.target_widths)
    widths = list(fitted.target_widths.values())
    target_mean = fitted.target_sums.sum(0) / fitted.rows
    errors = torch.zeros(2, len(blocks), len(widths), dtype=torch.float64, device=fitted.images.device)
    used = torch.zeros(len(blocks), dtype=torch.float64, device=fitted.images.device)
    for row, block in enumerate(blocks):
        if mine is not None and block not in mine:
            continue
        mean = fitted.sums[block].sum(0) / fitted.rows
        solution = solve(*fitted.about(block, mean, target_mean)[:2])
        used[row] = solution.rank
        for part, moments in enumerate((fitted, held_out)):
            gram, cross, squares = moments.about(block, mean, target_mean)
            error = squares + (solution.weights * (gram @ solution.weights - 2 * cross)).sum(0)
            means = [e.mean() for e in (error.clamp_min(0) / moments.rows).split(widths)]
            errors[part, row] = torch.stack(means)
    errors, used = total(errors).cpu(), total(used)
    column_variance = held_out.target_squares / held_out.rows - (held_out.target_sums.sum(0) / held_out.rows).square()
    variance = torch.stack([each.mean() for each in column_variance.split(widths)])
    counts = [int(count) for count in used.tolist()]
    return Search(
        blocks, reward_blocks, errors[0], errors[1], variance.cpu(), counts, [fitted.widths[i] for i in blocks]
    )


def initial_weights(moments: Moments, block: int, reward_block: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the initial weights of a pair: W and, for j > 1, the class token's mean state and position offsets.

    W is (width + 1, target width), its last row the constant. Beyond the first block, the targets contain position
    embeddings; W and the offsets are then fitted jointly.
    """
    columns = moments.columns(reward_block)
    means = moments.sums[block] / moments.images, moments.target_sums[:, columns] / moments.images
    if reward_block == 1:
        mean, target_mean = (each.mean(0) for each in means)
        every = moments.target_sums.sum(0) / moments.rows
        gram, cross, _ = moments.about(block, mean, every)
        weights = solve(gram, cross[:, columns]).weights
        return torch.cat([weights, (target_mean - mean @ weights)[None]]), None, None
    gram = moments.gram[block] - moments.sums[block].T @ means[0]
    cross = moments.cross[block][:, columns] - moments.sums[block].T @ means[1]
    weights = solve(gram, cross).weights
    offsets = means[1] - means[0] @ weights
    constant = torch.zeros_like(weights[:1])
    return torch.cat([weights, constant]), moments.class_sums[reward_block] / moments.images, offsets


def heat_map(result: Search, path: Path) -> None:
    """Draw the residuals of all pairs on the fitted and on the held-out images, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(3 + 1.5 * len(result.reward_blocks), 1.6 + 0.42 * len(result.blocks)), layout="constrained"
    )
    for place, (title, values) in enumerate((("fitted", result.fit), ("held out", result.held_out)), start=1):
        axes = figure.add_subplot(1, 2, place)
        axes.imshow(values.log(), cmap="viridis_r", aspect="auto")
        axes.set_xticks(range(len(result.reward_blocks)), [str(j) for j in result.reward_blocks])
        axes.set_yticks(range(len(result.blocks)), ["latent" if i == 0 else str(i) for i in result.blocks])
        axes.set_xlabel("reward block j")
        axes.set_ylabel("backbone block i")
        axes.set_title(f"mean squared residual, {title}")
        middle = values.log().mean()
        for row in range(len(result.blocks)):
            for column in range(len(result.reward_blocks)):
                value = values[row, column]
                colour = "white" if value.log() > middle else "black"
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=8, color=colour)
    save_figure(figure, path, dpi=120)
