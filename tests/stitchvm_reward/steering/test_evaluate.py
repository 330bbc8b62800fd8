"""Comparisons of ways of steering."""

import json

import pytest

COMPARISON = """
base: {root}/recipes/steer/compare.yaml
out: {out}
count: 3
seeds: [0, 1]
cost_prompts: 2
arms:
  - {{family: FK, label: "2", method: fk, recipe: {pixel}, changes: [{changes}, fk.particles=2]}}
  - {{family: FK + V, label: "2", method: fk, recipe: {value}, changes: [{changes}, fk.particles=2]}}
  - {{family: DPS + V, label: "90", method: dps, recipe: {value}, changes: [steps=3, dps.strength=90]}}
"""


@pytest.fixture
def comparison(tmp_path, pytestconfig):
    path, changes = tmp_path / "compare.yaml", 'steps=3, "fk.window=[1,2]", fk.every=1'
    recipes = {"pixel": "recipes/steer/shapes_pixel.yaml", "value": "recipes/steer/shapes.yaml"}
    path.write_text(COMPARISON.format(root=pytestconfig.rootpath, out=tmp_path / "out", changes=changes, **recipes))
    return path, f"cache={tmp_path}/cache"


@pytest.mark.slow
def test_a_comparison_measures_every_arm_once_and_draws_what_it_found(comparison, launched, tmp_path):
    path, cache = comparison
    assert launched("evaluate", "steering", path, cache)[0] == 0
    files = sorted((tmp_path / "out").glob("*.json"))
    assert len(files) == 6
    found = [json.loads(file.read_text()) for file in files]
    row = found[0]["row"]
    assert row["prompts"] == 3 and {"reward", "true_aesthetic", "checker", "checker_share"} <= row.keys()
    for one in found:
        assert ("founders" in one["row"]) == (one["arm"]["method"] == "fk")
        assert all(one["row"][name] == pytest.approx(sum(values) / 3) for name, values in one["scores"].items())
        assert all(1 <= number <= 2 for number in one["scores"].get("founders", []))
    before = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    assert launched("evaluate", "steering", path, cache)[0] == 0  # goes on with what is missing
    assert [file.stat().st_mtime_ns for file in files[1:]] == before[1:] and files[0].exists()
    assert json.loads(files[0].read_text())["row"] == row

    assert launched("evaluate", "steering", path, cache, "--cost")[0] == 0
    costs = {cost["family"]: cost for cost in json.loads((tmp_path / "out" / "costs.json").read_text())["rows"]}
    assert all(cost["seconds"] > 0 and cost["gigaflop"] > 0 and cost["peak_mib"] > 0 for cost in costs.values())
    code, out, _ = launched("evaluate", "steering", path, cache, "--plot", tmp_path / "plot.png")
    assert code == 0 and (tmp_path / "plot.png").stat().st_size > 10_000
    lines = out.splitlines()
    assert len(lines) == 4 and lines[1].startswith("FK 2") and "±" in lines[1] and "gigaflop" in lines[0]
    assert "founders" in lines[0] and " - " in lines[3]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("seeds=[]", "seeds must be numbers from 0 on"),
        ("arms=[]", "every arm needs a unique family and label"),
        ("count=201", "count must be at most 200, the number of prompts in miniature/prompts/held_out.txt, got 201"),
        ("arms=[{family: a, label: b, method: fkk, recipe: c}]", "an arm's method: did you mean 'fk'?"),
        ("arms=[{family: a, label: b, method: fk, recipe: nowhere.yaml}]", "recipe not found: nowhere.yaml"),
        ("measures=[miniature.measures:beauty]", "cannot import miniature.measures:beauty"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_told_in_one_line(comparison, launched, tmp_path, change, told):
    path, cache = comparison
    code, out, error = launched("evaluate", "steering", path, cache, change)
    assert code == 2 and out == "" and len(error.splitlines()) == 1 and told in error, error
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_was_not_run_cannot_be_drawn(comparison, launched, tmp_path):
    code, _, error = launched("evaluate", "steering", comparison[0], "--plot", tmp_path / "plot.png")
    assert code == 2 and "has no results of this comparison" in error
