"""Stage 1: which backbone block fits which reward block, by closed-form least squares (Stitched Value Model, 4.1)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.stitching.layer import resample


@dataclass(frozen=True)
class Probe:
    """Features of the same images on the reward model's patch grid.

    `backbone` maps block i to its output (images, patches, width_i) for noisy latents. `reward` maps block j to its
    input (images, patches, width_j) for the clean images, `class_states` to the class token there (j > 1).
    """

    backbone: dict[int, Tensor]
    reward: dict[int, Tensor]
    class_states: dict[int, Tensor]


@dataclass(frozen=True)
class Search:
    """Mean squared residuals of pairs (i, j) on the fitted and on the held-out images; variance of the targets by j."""

    blocks: list[int]
    reward_blocks: list[int]
    fit: Tensor
    held_out: Tensor
    variance: Tensor

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
        """Return one row per pair: block, reward_block, fit, held_out, unexplained (share of the targets' variance)."""
        return [
            {
                "block": i,
                "reward_block": j,
                "fit": float(self.fit[row, column]),
                "held_out": float(self.held_out[row, column]),
                "unexplained": float(self.held_out[row, column] / self.variance[column]),
            }
            for row, i in enumerate(self.blocks)
            for column, j in enumerate(self.reward_blocks)
        ]


@torch.no_grad()
def backbone_features(
    head: BackboneHead, latents: Tensor, sigma: Tensor, conditions: Conditions, *, blocks: list[int], side: int
) -> dict[int, Tensor]:
    """Return the features after each of `blocks` on a side x side grid, (batch, patches, width), on the CPU."""
    features = head.features(latents, sigma, conditions, blocks)
    return {i: resample(h, side).flatten(2).transpose(1, 2).cpu() for i, h in features.items()}


def solve(features: Tensor, targets: Tensor) -> Tensor:
    """Return W, (width + 1, target width) float64: least squares of targets on features and a constant.

    Both are (rows, width).
    """
    return torch.linalg.lstsq(_design(features), targets.double()).solution


def _design(features: Tensor) -> Tensor:
    return torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], dim=1)


def search(probe: Probe, fitted: int) -> Search:
    """Fit every pair on the first `fitted` images and measure it on those and on the others, in float64."""
    blocks, reward_blocks = sorted(probe.backbone), sorted(probe.reward)
    widths = [probe.reward[j].shape[-1] for j in reward_blocks]
    targets = torch.cat([probe.reward[j].double() for j in reward_blocks], dim=-1)
    tables: dict[bool, list[list[float]]] = {True: [], False: []}
    for i in blocks:
        features = probe.backbone[i]
        solution = solve(features[:fitted].flatten(0, 1), targets[:fitted].flatten(0, 1))
        for inside in (True, False):
            part = slice(None, fitted) if inside else slice(fitted, None)
            residual = _design(features[part].flatten(0, 1)) @ solution - targets[part].flatten(0, 1)
            tables[inside].append([float(r.square().mean()) for r in residual.split(widths, dim=1)])
    variance = [float(t.var(dim=0, correction=0).mean()) for t in targets[fitted:].flatten(0, 1).split(widths, dim=1)]
    fit, held_out = (torch.tensor(tables[inside], dtype=torch.float64) for inside in (True, False))
    return Search(blocks, reward_blocks, fit, held_out, torch.tensor(variance, dtype=torch.float64))


def initial_weights(probe: Probe, block: int, reward_block: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the initial weights of a pair: W and, for j > 1, the class token's mean state and position offsets.

    Beyond the first block, the targets contain position embeddings; W and the offsets are then fitted jointly.
    """
    features, targets = probe.backbone[block].double(), probe.reward[reward_block].double()
    if reward_block == 1:
        return solve(features.flatten(0, 1), targets.flatten(0, 1)), None, None
    solution = solve((features - features.mean(0)).flatten(0, 1), (targets - targets.mean(0)).flatten(0, 1))
    offsets = targets.mean(0) - features.mean(0) @ solution[:-1] - solution[-1]
    return solution, probe.class_states[reward_block].mean(0), offsets


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
    figure.savefig(path, dpi=120)
