"""Write scenes of the miniature world as PNG files with their captions beside them:

python -m miniature.images --count 8000 --out runs/shapes-images
"""

import argparse
from pathlib import Path

from PIL import Image

from miniature import scenes

SEED = 21


def write(count: int, folder: Path, seed: int = SEED, held_out: bool = False) -> None:
    """`count` scenes as NNNNN.png and NNNNN.txt, of combinations of facts that the models were trained on or of
    `held_out` ones; files that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = scenes.draw_scenes(count, seed, held_out)
    for first in range(0, count, 500):
        part = drawn[first : first + 500]
        for offset, (scene, image) in enumerate(zip(part, scenes.render(part), strict=True)):
            path = folder / f"{first + offset:05d}.png"
            if not path.exists():
                path.with_suffix(".txt").write_text(scene.caption + "\n")
                pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8000, help="number of scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/shapes-images"), help="folder to write to")
    parser.add_argument("--held-out", action="store_true", help="facts that no model here was trained on")
    arguments = parser.parse_args()
    write(arguments.count, arguments.out, held_out=arguments.held_out)


if __name__ == "__main__":
    main()
