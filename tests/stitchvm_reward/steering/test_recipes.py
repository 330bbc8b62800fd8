"""The shipped recipes of steering."""

import pytest

from stitchvm_reward.runs.recipe import read_recipe
from stitchvm_reward.steering.evaluate import ComparisonRecipe, settings_of
from stitchvm_reward.steering.settings import METHODS, SteeringRecipe
from tests.tiny import ROOT

FOLDER = ROOT / "recipes/steer"
COMPARISONS = sorted(FOLDER.glob("compare_*.yaml"))
SETTINGS = [path for path in sorted(FOLDER.glob("*.yaml")) if not path.stem.startswith("compare")]


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_a_shipped_recipe_steers_by_every_method(path):
    recipe = read_recipe(SteeringRecipe, path)
    for method in METHODS:
        recipe.require_method(method)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_arm_of_a_shipped_comparison_can_be_run(path):
    recipe = read_recipe(ComparisonRecipe, path)
    assert recipe.count >= 100 and recipe.seeds == [0, 1, 2]
    for arm in recipe.arms:
        settings_of(arm)
