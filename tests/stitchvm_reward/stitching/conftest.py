"""A small value model of the bundled miniature, built once: search and one short epoch."""

from pathlib import Path

import pytest

RECIPES = {"aesthetic": "recipes/stitch/shapes_aesthetic.yaml", "clip": "recipes/stitch/shapes_clip.yaml"}


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    from miniature.images import write

    folder = tmp_path_factory.mktemp("images")
    write(72, folder)
    (folder / "empty.png").write_bytes(b"")
    (folder / "torn.png").write_bytes((folder / "00000.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="session")
def stitch(image_folder, tmp_path_factory):
    """stitch(kind, out, "key=value", ...) -> the folder of a value model of that reward kind."""
    from stitchvm_reward.runs.launcher import make_accelerator
    from stitchvm_reward.stitching.build import build
    from stitchvm_reward.stitching.config import load_stitch_recipe

    cache = tmp_path_factory.mktemp("targets")

    def run(kind: str, out: Path, *more: str, only_search: bool = False) -> Path:
        small = [
            f"data.images={image_folder}",
            f"data.cache={cache}",
            "data.held_out=8",
            "search.probe=24",
            "search.held_out=8",
            "search.last_reward_block=2",
            "finetune.epochs=2",
            "finetune.batch=16",
            "finetune.micro_batch=8",
            "finetune.warmup=2",
            "evaluation.sigmas=[0.25]",
            "checkpoint.every=1",
        ]
        recipe = load_stitch_recipe(RECIPES[kind], [*small, f"out={out}", *more])
        return build(recipe, make_accelerator(), only_search)

    return run


@pytest.fixture(scope="session")
def aesthetic_folder(stitch, tmp_path_factory) -> Path:
    return stitch("aesthetic", tmp_path_factory.mktemp("stitch") / "aesthetic", "backbone.block=2", "reward.block=1")


@pytest.fixture(scope="session")
def clip_folder(stitch, tmp_path_factory) -> Path:
    return stitch("clip", tmp_path_factory.mktemp("stitch") / "clip", "backbone.block=3", "reward.block=2")
