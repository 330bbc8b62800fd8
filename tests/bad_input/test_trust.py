"""Recipes from elsewhere run no code unless the user says so."""

import sys

import pytest
import yaml

from nft.cost import scaling
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.recipe import require_trust
from tests.tiny import RECIPE, ROOT

PROMPTS = ("--prompts", "a red circle", "--grid")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """elsewhere(name, base=FILE, key=value, ...) -> a recipe outside the tree, whose code must not be imported."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil.py").write_text("def score(images, prompts): return images.mean((1, 2, 3))\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])  # commands set the first one
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(name, base, **keys):
        path = tmp_path / name
        path.write_text(yaml.safe_dump({"base": str(ROOT / base)} | keys))
        return path

    yield write
    assert "evil" not in sys.modules


EVIL = [{"kind": "evil:score"}]
RULE = "lies outside the current folder, and the recipe runs code: "


@pytest.mark.parametrize("keys", [{"rewards": EVIL}, {"evaluation": {"metrics": ["evil:score"]}}])
@pytest.mark.parametrize("command", [["nft"], ["nft", "--dry-run"], ["evaluate", "images"]], ids=" ".join)
def test_rewards_and_metrics(refused, elsewhere, keys, command):
    path = elsewhere("mine.yaml", RECIPE, **keys)
    line = refused(*command, path)
    assert f"{path} {RULE}" in line and "evil:score" in line and "--trust-code" in line


def test_steering(refused, elsewhere, tmp_path):
    steer = elsewhere("steer.yaml", "recipes/steer/shapes_pixel.yaml", rewards=EVIL)
    line = refused("sample", "M", *PROMPTS, tmp_path / "g.png", "--steer", "fk", "--steering", steer)
    assert f"{steer} {RULE}evil:score" in line


@pytest.mark.parametrize("inside", [True, False], ids=["changes", "another recipe"])
def test_a_comparison_and_its_arms(refused, elsewhere, inside):
    pixel = "recipes/steer/shapes_pixel.yaml"
    steer = ROOT / pixel if inside else elsewhere("steer.yaml", pixel, rewards=EVIL)
    changes = ["rewards=[{kind: 'evil:score'}]"] if inside else []
    arm = {"family": "a", "label": "b", "method": "fk", "recipe": str(steer), "changes": changes}
    plain = {"out": "runs/none", "reward": {"kind": "clip", "model": "miniature/weights/clip"}, "measures": []}
    path = elsewhere("compare.yaml", "recipes/steer/compare.yaml", arms=[arm], **plain)
    assert f"{path} {RULE}evil:score" in refused("evaluate", "steering", path)
    path = elsewhere("compare.yaml", "recipes/steer/compare.yaml", arms=[arm], **(plain | {"measures": ["evil:score"]}))
    assert f"{path} {RULE}evil:score" in refused("evaluate", "steering", path)


def test_scaling(elsewhere):
    path = elsewhere("mine.yaml", RECIPE, rewards=EVIL)
    with pytest.raises(InputError, match=f"mine.yaml {RULE}evil:score"):
        scaling.run(scaling.parse([str(path)]))


def test_a_base_outside_counts_and_one_who_trusts_is_not_asked(tmp_path, monkeypatch):
    (tmp_path / "tree").mkdir()
    inside, outside = tmp_path / "tree" / "recipe.yaml", tmp_path / "base.yaml"
    inside.write_text("base: ../base.yaml\n")
    outside.write_text("epochs: 3\n")
    monkeypatch.chdir(tmp_path / "tree")
    with pytest.raises(InputError, match=r"base.yaml lies outside the current folder, and the recipe runs code: a:b;"):
        require_trust(["a:b"], False, "recipe.yaml")
    require_trust([], False, "recipe.yaml")
    require_trust(["a:b"], True, "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    require_trust(["a:b"], False, "tree/recipe.yaml", inside)
    (tmp_path / "tree" / "link.yaml").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match=r"link.yaml lies outside"):
        require_trust(["a:b"], False, "tree/link.yaml")


@pytest.mark.parametrize(
    "command", [("nft",), ("evaluate", "images"), ("evaluate", "steering"), ("sample",)], ids=" ".join
)
def test_every_command_that_runs_what_a_recipe_names_has_the_option(launched, capfd, command):
    with pytest.raises(SystemExit):
        launched(*command, "--help")
    assert "--trust-code" in capfd.readouterr().out
