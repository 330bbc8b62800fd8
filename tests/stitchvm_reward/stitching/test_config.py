"""Stitching recipes: the shipped ones load, mistakes are told."""

from pathlib import Path

import pytest

from stitchvm_reward.errors import InputError
from stitchvm_reward.stitching.config import load_stitch_recipe

ROOT = Path(__file__).resolve().parents[3]
RECIPE = "recipes/stitch/shapes_aesthetic.yaml"
SHIPPED = [path for path in sorted((ROOT / "recipes/stitch").glob("*.yaml")) if "\nout:" in path.read_text()]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    assert load_stitch_recipe(path).reward.model


def test_shipped_recipes_name_the_kind_of_their_reward():
    kinds = {path.stem: load_stitch_recipe(path).reward.kind for path in SHIPPED}
    rewards = {"aesthetic": "aesthetic", "clip": "clip", "dfn": "dfn_clip", "hpsv2": "hpsv2", "pickscore": "pickscore"}
    published = {f"{model}_{name}": kind for model in ("sd35m", "sd35l", "flux") for name, kind in rewards.items()}
    shapes = {"shapes_aesthetic": "aesthetic", "shapes_aesthetic_prompt": "aesthetic", "shapes_clip": "clip"}
    shapes |= {"shapes_flux": "aesthetic", "shapes_generated": "aesthetic"}
    assert kinds == published | shapes


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("finetune.learnig_rate=1e-4", "did you mean 'learning_rate'"),
        ("finetune.epochs=0", "finetune.epochs must be at least 1"),
        ("evaluation.sigmas=[0.5,1.0]", "evaluation.sigmas must lie between 0 and 1, got 1.0"),
        ("model.resolution=60", "must be a multiple of 16"),
        ("backbone.conditioning=caption", "must be one of null, prompt"),
        ("reward.head=''", "reward.head must name a file"),
        ("reward.kind=hpsv2", "and nothing for another kind"),
        ("reward.kind=dfn", "reward.kind must be one of aesthetic, clip, dfn_clip, hpsv2, pickscore, got 'dfn'"),
        ("reward.block=0", "reward.block must be 1 or more"),
    ],
)
def test_mistakes_are_told_with_the_rule(override, told):
    with pytest.raises(InputError, match=told):
        load_stitch_recipe(RECIPE, [override])
