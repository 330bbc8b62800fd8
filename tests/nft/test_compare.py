"""Comparing runs by what a held-out measure cost them."""

import json
import sys

import numpy as np
import pytest

from nft.evaluation import compare
from nft.evaluation.compare import figures, table
from nft.evaluation.curves import crossing, read_curve
from nft.evaluation.plots import pareto_curve
from nft.evaluation.targets import arms_of, check_comparable, compare_arms
from stitchvm_reward.errors import InputError

PROMPTS = 40


def spread(seed, name="truth"):
    """What each prompt's score is above or below the mean, (PROMPTS,); their mean is zero."""
    values = np.random.default_rng([seed, len(name)]).normal(size=PROMPTS)
    return values - values.mean()


def write(folder, values, seconds, teraflop=2.0, *, seed=0, kept=0.0, held_out="prompts.txt"):
    """A run whose mean of `truth` is in `values` by epoch (None: not evaluated); each epoch adds `kept` to `floor`."""
    folder.mkdir(parents=True)
    rows, scores = [], []
    for epoch, value in enumerate(values):
        row = {"epoch": epoch, "seconds/evaluate": 100.0}
        if epoch:
            row |= {"seconds/rollout": seconds / 2, "seconds/train": seconds / 2, "cost/teraflop": teraflop}
        if value is not None:
            truth, floor = value + 0.3 * spread(seed), 0.5 + kept * epoch + 0.1 * epoch * spread(seed, "floor")
            found = {"total": truth, "truth": truth, "floor": floor}
            row |= {f"held_out/{name}": float(each.mean()) for name, each in found.items()}
            scores.append({"epoch": epoch, "scores": {name: each.tolist() for name, each in found.items()}})
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    (folder / "recipe.yaml").write_text(f"seed: {seed}\nprompts: {{held_out: {held_out}}}\n")
    return folder


@pytest.fixture
def two_arms(tmp_path):
    """Three seeds of an arm that reaches 2.0 in 20 to 24 s and of one that does in half of that and loses the floor."""
    folders = []
    for seed in range(3):
        slower = 1 - 0.05 * seed
        folders.append(write(tmp_path / f"full-seed{seed}", [0, slower, 2 * slower, 3], 10.0, seed=seed))
        faster = write(tmp_path / f"half-seed{seed}", [0, slower, 2 * slower, 3], 5.0, 1.0, seed=seed, kept=-0.2)
        folders.append(faster)
    return folders


@pytest.fixture
def command(monkeypatch, capsys):
    """command(argument, ...) -> exit code, standard output and error of the comparison."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
        code = compare.run_command(lambda: compare.run(compare.parse()))
        return code, *capsys.readouterr()

    return run


def test_a_target_is_reached_in_proportion_between_two_evaluations(tmp_path):
    curve = read_curve(write(tmp_path / "run", [1.0, None, 2.0, None, 4.0], seconds=10.0))
    whole = {"seconds": [0.0, 20.0, 40.0], "teraflop": [0.0, 4.0, 8.0], "epoch": [0, 2, 4]}
    parts = {"rollout": [0.0, 10.0, 20.0], "train": [0.0, 10.0, 20.0]}
    nothing = {phase: [0.0] * 3 for phase in ("decode", "score", "audit", "meet")}
    assert {axis: values.tolist() for axis, values in curve.axes.items()} == whole | parts | nothing
    assert set(curve.scores) == {"total", "truth", "floor"} and curve.scores["truth"].shape == (PROMPTS, 3)
    assert curve.measures["truth"] == pytest.approx([1.0, 2.0, 4.0])
    place = crossing(np.array([[1.0, 2.0, 4.0], [1.0, 1.0, 2.0], [3.5, 0.0, 0.0]]), 3.0)
    assert place.reached.tolist() == [True, False, True]
    assert place.at(curve.axes["seconds"]).tolist() == pytest.approx([30.0, np.nan, 0.0], nan_ok=True)
    assert place.at(curve.axes["rollout"])[0] == 15.0


def test_costs_and_their_ratio_have_intervals_and_the_ratio_is_paired(two_arms):
    full, half = compare_arms([read_curve(folder) for folder in two_arms], "truth", 2.0)
    expected = np.mean([20.0, *(20 + 10 * (2 - 2 * slow) / (3 - 2 * slow) for slow in (0.95, 0.9))])
    assert full.cost["seconds"].mean == pytest.approx(expected)
    assert full.cost["seconds"].low < expected < full.cost["seconds"].high < expected + 5
    assert full.cost["rollout"].mean == pytest.approx(expected / 2)
    # Both arms have the same scores: in every resample one costs half of what the other does.
    assert half.less["seconds"].mean == pytest.approx(2) and half.less["teraflop"].low == pytest.approx(2)
    assert half.less["seconds"].high == pytest.approx(2) and half.less["epoch"].mean == pytest.approx(1)


def test_the_interval_of_a_cost_comes_from_prompts_and_from_seeds(tmp_path, two_arms):
    whole, _ = compare_arms([read_curve(folder) for folder in two_arms], "truth", 2.0)
    [alone] = compare_arms([read_curve(tmp_path / "full-seed1")], "truth", 2.0)
    assert alone.seeds == [1]
    # A resample's mean of 40 prompts of spread 0.3 is 0.047 off, which is 0.05 epochs.
    assert alone.cost["epoch"].high - alone.cost["epoch"].low == pytest.approx(4 * 0.047, rel=0.5)
    assert whole.cost["epoch"].high - whole.cost["epoch"].low > 0.1


def test_a_floor_is_said_to_have_changed_only_where_its_interval_excludes_zero(two_arms):
    curves = [read_curve(folder) for folder in two_arms]
    arms = compare_arms(curves, "truth", 2.0)
    assert [arm.verdict("floor") for arm in arms] == ["unresolved", "fell"]
    change = arms[1].change["floor"]
    assert change.mean == pytest.approx(-0.2 * arms[1].cost["epoch"].mean, abs=1e-6)
    text = "\n".join(table(curves, arms, "truth", 2.0, "floor"))
    assert f"no change of floor is resolved; it fell by at most {-arms[0].change['floor'].low:.3f}" in text
    assert f"floor: floor fell by {-change.high:.3f} to {-change.low:.3f}" in text
    assert "floor:" not in "\n".join(table(curves, arms, "truth", 2.0))


def test_an_arm_of_which_a_run_never_gets_there_has_no_cost(tmp_path):
    folders = [write(tmp_path / f"full-seed{seed}", [0.0, 2.0], 10.0, seed=seed) for seed in (0, 1)]
    folders += [write(tmp_path / f"half-seed{seed}", [0.0, 4.0 * seed], 5.0, seed=seed) for seed in (0, 1)]
    curves = [read_curve(folder) for folder in folders]
    arms = compare_arms(curves, "truth", 1.0)
    never = arms[1]
    assert never.reached == 1 and never.cost["seconds"].mean == np.inf and never.less == {}
    # A quarter of the resamples drew the second seed alone.
    assert never.cost["seconds"].low == pytest.approx(1.25, abs=0.1) and never.cost["seconds"].high == np.inf
    assert never.verdict("floor") == "unresolved"
    text = "\n".join(table(curves, arms, "truth", 1.0, "floor"))
    assert "1 of 2 runs never reached it" in text and "never [1." in text and "best" in text
    [row] = [row for row in figures(curves, arms, "truth", 1.0, "floor")["arms"] if row["name"] == "half"]
    assert row["cost"]["seconds"]["mean"] is None and row["cost"]["seconds"]["low"] > 0
    json.dumps(row, allow_nan=False)


def test_an_arm_that_begins_above_the_target_has_spent_nothing(tmp_path):
    folders = [write(tmp_path / "slow", [1.0, None, 3.0], 10.0), write(tmp_path / "above", [5.0, 5.0], 10.0)]
    slow, above = compare_arms([read_curve(folder) for folder in folders], "truth", 2.0)
    assert above.cost["seconds"].mean == above.cost["seconds"].high == 0 and above.less == {}
    assert slow.cost["epoch"].mean == pytest.approx(1.0)


def test_arms_are_paired_over_the_seeds_that_both_have(two_arms, tmp_path):
    curves = [read_curve(folder) for folder in two_arms if folder.name != "half-seed0"]
    arms = compare_arms(curves, "truth", 2.0)
    assert arms[1].shared == [1, 2] and arms[1].less["seconds"].mean == pytest.approx(2)
    text = "\n".join(table(curves, arms, "truth", 2.0))
    assert "(seeds 1, 2 of both)" in text and "full (3 seeds)" in text and "half (2 seeds)" in text
    curves.append(read_curve(write(tmp_path / "other-seed7", [0, 3], 1.0, seed=7)))
    arms = compare_arms(curves, "truth", 2.0)
    assert arms[2].shared == [] and arms[2].less == {}
    text = "\n".join(table(curves, arms, "truth", 2.0))
    assert "no seed in common with full" in text and "other (1 seed, over prompts alone)" in text


def test_the_command_writes_a_table_figures_and_plots_for_several_targets(two_arms, command, tmp_path):
    files = {name: tmp_path / "new" / name for name in ("cost.png", "pareto.png", "cost.json")}
    outputs = ("--out", files["cost.png"], "--pareto", files["pareto.png"], "--json", files["cost.json"])
    code, out, error = command(*two_arms, "--measure", "truth", "--target", 1.5, 2.0, "--floor", "floor", *outputs)
    assert code == 0, error
    assert out.count("measures at truth") == 2 and "2.00 [2.00, 2.00] times less seconds" in out
    for name in ("cost.png", "pareto.png"):
        assert files[name].read_bytes()[:4] == b"\x89PNG"
    found = json.loads(files["cost.json"].read_text())
    assert [target["target"] for target in found["targets"]] == [1.5, 2.0] and found["confidence"] == 0.95
    first, second = found["targets"][1]["arms"]
    assert first["floor"] == {"measure": "floor", "verdict": "unresolved"} and second["floor"]["verdict"] == "fell"
    assert second["less"]["seconds"]["low"] == pytest.approx(2) and len(found["targets"][0]["runs"]) == 6


def test_a_pareto_curve_is_the_mean_over_an_arms_runs_where_all_were_evaluated(tmp_path):
    folders = [
        write(tmp_path / "a-seed0", [0.0, 1.0, 2.0], 1.0, seed=0, kept=-0.1),
        write(tmp_path / "a-seed1", [0.0, None, 4.0], 1.0, seed=1, kept=-0.3),
    ]
    [runs] = arms_of([read_curve(folder) for folder in folders]).values()
    across, up = pareto_curve(runs, "truth", "floor")
    assert across == pytest.approx([0.0, 3.0]) and up == pytest.approx([0.5, 0.1])


def test_bad_input_is_told_in_one_line(two_arms, command, tmp_path):
    folder = two_arms[0]
    ask = ("--measure", "truth", "--target", 1.0)
    other = write(tmp_path / "other", [0, 1], 1.0, held_out="others.txt")
    again = write(tmp_path / "copy" / "full-seed0", [0, 1], 1.0)
    (tmp_path / "empty").mkdir()
    for arguments, told in (
        ((tmp_path / "empty", *ask), "holds no evaluated run"),
        ((folder, "--measure", "trut", "--target", 1), "has no measure trut: did you mean 'truth'?"),
        ((folder, *ask, "--floor", "flor"), "has no measure flor: did you mean 'floor'?"),
        ((folder, *ask, "--pareto", tmp_path / "p.png"), "name that with --floor"),
        ((folder, other, *ask), "were evaluated on different prompts (prompts.txt"),
        ((folder, again, *ask), "two runs of full have the seed 0"),
        ((folder, *ask, "--json", "setup.cfg/found.json"), "cannot write setup.cfg/found.json"),
    ):
        code, out, error = command(*arguments)
        assert code == 2 and out == "" and len(error.splitlines()) == 1 and told in error, error


def test_a_run_without_each_prompts_scores_is_refused(tmp_path):
    folder = write(tmp_path / "run", [0.0, 1.0], 1.0)
    lines = (folder / "held_out.jsonl").read_text().splitlines()
    (folder / "held_out.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(InputError, match=r"lacks the scores of each held-out prompt \(held_out.jsonl\) of epoch 1"):
        read_curve(folder)
    shorter = {name: values[:-1] for name, values in json.loads(lines[1])["scores"].items()}
    (folder / "held_out.jsonl").write_text(f"{lines[0]}\n{json.dumps({'epoch': 1, 'scores': shorter})}\n")
    with pytest.raises(InputError, match="was evaluated on 39 prompts and on 40"):
        read_curve(folder)


def test_runs_with_one_list_of_prompts_are_comparable(two_arms):
    check_comparable([read_curve(folder) for folder in two_arms], ["truth", "floor"])
