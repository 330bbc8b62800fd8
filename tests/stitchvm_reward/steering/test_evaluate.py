"""Comparisons of ways of steering."""

import json

import numpy as np
import pytest
from matplotlib.axes import Axes

from stitchvm_reward.bootstrap import mean_interval
from stitchvm_reward.files import write_json
from stitchvm_reward.runs.recipe import read_recipe
from stitchvm_reward.steering.evaluate import ComparisonRecipe
from stitchvm_reward.steering.plots import draw, front
from stitchvm_reward.steering.report import report, summary

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
    assert launched("evaluate", "steering", path, "--trust-code", cache)[0] == 0
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
    assert launched("evaluate", "steering", path, "--trust-code", cache)[0] == 0  # goes on with what is missing
    assert [file.stat().st_mtime_ns for file in files[1:]] == before[1:] and files[0].exists()
    assert json.loads(files[0].read_text())["row"] == row

    assert launched("evaluate", "steering", path, "--trust-code", cache, "--cost")[0] == 0
    costs = {cost["family"]: cost for cost in json.loads((tmp_path / "out" / "costs.json").read_text())["rows"]}
    assert all(cost["seconds"] > 0 and cost["gigaflop"] > 0 and cost["peak_mib"] > 0 for cost in costs.values())
    drawn = (
        "--plot",
        tmp_path / "plot.png",
        "--pareto",
        tmp_path / "deeper" / "pareto.png",
        "--floor",
        "checker_share",
    )
    code, out, _ = launched("evaluate", "steering", path, "--trust-code", cache, *drawn, "--against", "FK + V 2")
    assert code == 0
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("plot.png", "deeper/pareto.png"))
    lines = out.splitlines()
    assert lines[1].startswith("FK 2") and "[" in lines[1] and "gigaflop" in lines[0]
    assert "founders" in lines[0] and " - " in lines[3]
    assert lines[5].startswith("minus FK + V 2") and [line.split()[:2] for line in lines[6:8]] == [
        ["FK", "2"],
        ["DPS", "+"],
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("seeds=[]", "seeds must be numbers from 0 on"),
        ("arms=[]", "every arm needs a family and label of its own"),
        ("count=201", "count must be at most 200, the number of prompts in miniature/prompts/held_out.txt, got 201"),
        ("arms=[{family: a, label: b, method: fkk, recipe: c}]", "an arm's method: did you mean 'fk'?"),
        ("arms=[{family: a, label: b, method: fk, recipe: nowhere.yaml}]", "recipe not found: nowhere.yaml"),
        ("measures=[miniature.measures:beauty]", "cannot import miniature.measures:beauty"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_told_in_one_line(comparison, launched, tmp_path, change, told):
    path, cache = comparison
    code, out, error = launched("evaluate", "steering", path, "--trust-code", cache, change)
    assert code == 2 and out == "" and len(error.splitlines()) == 1 and told in error, error
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_was_not_run_cannot_be_drawn(comparison, launched, tmp_path):
    code, _, error = launched("evaluate", "steering", comparison[0], "--plot", tmp_path / "plot.png")
    assert code == 2 and "has no results of this comparison" in error


def results(folder, family, label, seeds, scores):
    """Write an arm's results; `scores` are (seeds, prompts) by measure."""
    for place, seed in enumerate(seeds):
        each = {name: values[place].tolist() for name, values in scores.items()}
        row = {"family": family, "label": label, "seed": seed, "prompts": len(each["reward"])}
        write_json(folder / f"{family}-{label}-seed{seed}.json".replace(" ", "-"), {"row": row, "scores": each})


@pytest.fixture
def measured(comparison, tmp_path):
    """The recipe of a comparison of which three arms have results, and each prompt's level, (seeds, prompts)."""
    generator, out = np.random.default_rng(0), tmp_path / "out"
    base = np.tile(generator.normal(6, 1, 50), (3, 1)) + 0.1 * generator.normal(size=(3, 50))
    kept = np.tile([1.0, 0.0], (3, 25))
    results(out, "FK", "2", [0, 1, 2], {"reward": base, "checker": kept, "founders": 1 + kept})
    results(out, "FK + V", "2", [0, 1], {"reward": base[:2] + 0.2, "checker": kept[:2]})
    results(out, "DPS + V", "90", [2], {"reward": base[2:] + 1.0, "checker": 0 * kept[2:]})
    return read_recipe(ComparisonRecipe, str(comparison[0])), base


def test_a_summary_has_intervals_of_means_and_of_paired_differences(measured):
    recipe, base = measured
    first, second, third = summary(recipe)
    assert first.means["reward"] == mean_interval(base) and first.differences == {} and first.seeds == [0, 1, 2]
    assert first.means["checker"].high - first.means["checker"].low == pytest.approx(4 * (0.25 / 50) ** 0.5, rel=0.1)
    # The second arm has two seeds of the baseline's: the level of a prompt and of a seed is no part of the difference.
    assert second.shared == [0, 1] and second.differences["reward"].text() == "0.200 [0.200, 0.200]"
    assert third.shared == [2] and third.differences["checker"].mean == -0.5
    assert third.differences["checker"].high < 0 and not second.differences["checker"].resolved
    against = summary(recipe, "DPS + V 90")
    assert against[0].differences["reward"].mean == pytest.approx(-1.0)
    assert against[1].shared == [] and against[1].differences == {}
    text = report(against, "DPS + V 90").splitlines()
    assert [line.split()[-2:] for line in text if line.startswith("FK + V")] == [[text[2].split()[-2], "-"], ["-", "-"]]
    assert against[0].differences.keys() == {"reward", "checker"}  # the baseline has no founders


def test_error_bars_end_where_the_intervals_do(measured, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, yerr, **_: drawn.append((y, yerr)))
    monkeypatch.setattr(Axes, "legend", lambda self, **_: None)
    arms = summary(measured[0])
    draw(arms, tmp_path / "plot.png")
    (heights, bars), reward = drawn[0], arms[0].means["reward"]
    assert heights == [reward.mean] and bars.tolist() == [[reward.mean - reward.low], [reward.high - reward.mean]]


def test_the_pareto_front_leaves_out_what_another_arm_exceeds():
    points = [(1.0, 5.0), (2.0, 4.0), (1.5, 3.0), (3.0, 1.0), (2.0, 3.5)]
    assert front(points) == [0, 1, 3]


def test_what_cannot_be_tabulated_is_told_in_one_line(comparison, measured, launched, tmp_path):
    path, out = comparison[0], tmp_path / "out"
    plot = ("--plot", tmp_path / "plot.png")
    for arguments, told in (
        ((*plot, "--against", "FK 3"), "--against must name a measured arm, got 'FK 3': did you mean 'FK 2'?"),
        (("--against", "FK 2"), "--against is for the tables of --plot and --pareto"),
        (("--pareto", tmp_path / "pareto.png"), "--pareto OUT.png and --floor MEASURE need each other"),
        (("--pareto", tmp_path / "pareto.png", "--floor", "cheker"), "did you mean 'checker'?"),
        (("--pareto", tmp_path / "pareto.png", "--floor", "founders"), "a measure of every arm, got 'founders'"),
    ):
        code, text, error = launched("evaluate", "steering", path, *arguments)
        assert code == 2 and text == "" and len(error.splitlines()) == 1 and told in error, error
    results(out, "FK", "2", [1], {"reward": np.ones((1, 7))})
    code, _, error = launched("evaluate", "steering", path, *plot)
    assert code == 2 and "has results of 7 and of 50 prompts" in error
    write_json(
        out / "FK-2-seed1.json", {"row": {"family": "FK", "label": "2", "seed": 1, "prompts": 50, "reward": 6.4}}
    )
    for arguments in (plot, ("--trust-code",)):  # and nothing is measured beside such a result
        code, _, error = launched("evaluate", "steering", path, *arguments)
        assert code == 2 and "FK-2-seed1.json lacks the scores of each prompt; remove it and run" in error
