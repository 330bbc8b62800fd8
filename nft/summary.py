"""Show what a run did: python -m nft.summary RUN_FOLDER"""

import argparse
from pathlib import Path

from stitchvm_reward.runs.tracking import read_metrics


def summary_lines(folder: Path) -> list[str]:
    """Held-out measures before and after, where the time went, and where the pictures are."""
    rows = read_metrics(folder)
    if len(rows) < 2:
        raise SystemExit(f"error: {folder} holds no finished run")
    held_out = [row for row in rows if "held_out/total" in row]
    first, last = held_out[0], held_out[-1]
    lines = [f"{'held out':24}{'before':>10}{'after':>10}{'change':>10}   (spread before, after)"]
    for name in first:
        if name.startswith("held_out/") and not name.endswith("_std"):
            spread = f"({first[name + '_std']:.3f}, {last[name + '_std']:.3f})"
            change = last[name] - first[name]
            lines.append(f"{name[9:]:24}{first[name]:10.3f}{last[name]:10.3f}{change:+10.3f}   {spread}")
    phases: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("seconds/"):
                phases[name[8:]] = phases.get(name[8:], 0.0) + value
    whole = sum(phases.values())
    lines.append("")
    lines += [f"{name:24}{value:8.1f} s{value / whole:8.0%}" for name, value in phases.items()]
    lines.append(f"{'total':24}{whole:8.1f} s")
    epochs = [row for row in rows if "images_per_second" in row]
    lines.append(
        f"{len(epochs)} epochs, {sum(r['images_per_second'] for r in epochs) / len(epochs):.1f} images a second"
    )
    return [*lines, "", f"pictures: {folder / 'before_after.png'}   curves: {folder / 'curves.png'}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a run folder")
    print("\n".join(summary_lines(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
