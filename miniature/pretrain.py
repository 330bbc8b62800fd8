"""Pretrain the miniature world's models, one part per call, each resumable from its own checkpoint:

python -m miniature.pretrain vae        # autoencoder, then
python -m miniature.pretrain clip       # CLIP, the second text tower and the aesthetic head, then
python -m miniature.pretrain reward     # CLIP and the head again, as reward models, then
python -m miniature.pretrain generator  # the Stable Diffusion 3 transformer and T5, then
python -m miniature.pretrain smaller    # a smaller transformer, pruned and distilled from weights/sd3, then
python -m miniature.pretrain flux       # a FLUX-class transformer, distilled with guidance from weights/sd3, then
python -m miniature.pretrain measure    # the quality table and the sample grid
"""

import argparse
from pathlib import Path

import torch

from miniature import assemble, clip, flux, generator, reward, scenes, smaller, vae

POOL = 40_000
POOL_SEED = 1


def draw_pool(count: int = POOL) -> tuple[list[scenes.Scene], torch.Tensor]:
    """The training scenes and their pictures as uint8 (count, 3, 64, 64)."""
    drawn = scenes.draw_scenes(count, POOL_SEED)
    parts = [scenes.render(drawn[first : first + 1000]) for first in range(0, count, 1000)]
    return drawn, torch.cat([(part * 255).round().to(torch.uint8) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["vae", "clip", "reward", "generator", "smaller", "flux", "measure"])
    parser.add_argument("--folder", type=Path, default=Path("runs/pretrain"), help="where checkpoints go")
    parser.add_argument("--stop-at", type=int, help="stop after this step, on the same schedule")
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.part == "measure":
        assemble.measure(folder)
        smaller.measure()
        flux.measure()
        return
    drawn, pool = draw_pool()
    if arguments.part == "vae":
        vae.pretrain(folder, pool, arguments.stop_at)
    elif arguments.part == "clip":
        clip.pretrain(folder, drawn, pool, arguments.stop_at)
    elif arguments.part == "reward":
        reward.pretrain(folder, assemble.load_towers(folder), assemble.load_vae(folder), drawn, pool, arguments.stop_at)
    elif arguments.part == "flux":
        flux.pretrain(folder, drawn, pool, arguments.stop_at)
    elif arguments.part == "smaller":
        smaller.pretrain(folder, drawn, pool, arguments.stop_at)
    else:
        generator.pretrain(
            folder, drawn, pool, assemble.load_vae(folder), assemble.load_towers(folder), arguments.stop_at
        )


if __name__ == "__main__":
    main()
