"""Names that come from files and become parts of paths."""

import pytest
import yaml

from stitchvm_reward.diffusion.backbone import read_weights
from stitchvm_reward.errors import InputError
from stitchvm_reward.files import check_name, check_path
from stitchvm_reward.runs import checkpoint
from tests.tiny import RECIPE, ROOT

ESCAPES = {
    "separator": "../../escaped",
    "parent": "..",
    "backslash": "a\\b",
    "line break": "a\nb",
    "null byte": "a\0b",
    "right to left": "a\u202eb",
    "too long": "é" * 101,
    "empty": "",
}
escaping = pytest.mark.parametrize("name", ESCAPES.values(), ids=ESCAPES)
RULE = "becomes part of a path: it must be 1 to 200 printable bytes"


@escaping
def test_names_that_lead_elsewhere_are_refused_in_one_line(name):
    with pytest.raises(InputError, match=f"the culprit {RULE}") as refused:
        check_name("the culprit", name)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 300


@pytest.mark.parametrize("name", ["true_aesthetic", "FK + V 16", "été", "...", ".hidden", "a..b", "é" * 100])
def test_other_names_are_accepted(name):
    check_name("the culprit", name)


def test_a_path_may_lead_upwards_and_be_absolute():
    for path in ("../runs/a", "/var/tmp/runs", "./runs//b", "~/runs"):
        check_path("out", path)
    with pytest.raises(InputError, match=f"a folder in out {RULE}.*'b.nc'"):
        check_path("out", "runs/b\nc/d")


@pytest.fixture
def comparison(tmp_path):
    """comparison(key=value, ...) -> a comparison of one arm, with these keys of the arm set."""

    def write(**arm):
        path = tmp_path / "compare.yaml"
        one = {"family": "FK", "label": "2", "method": "fk", "recipe": str(ROOT / "recipes/steer/shapes.yaml")} | arm
        base = str(ROOT / "recipes/steer/compare.yaml")
        path.write_text(yaml.safe_dump({"base": base, "out": str(tmp_path / "deep/er/out"), "arms": [one]}))
        return path

    return write


@pytest.mark.parametrize("key", ["family", "label"])
@pytest.mark.parametrize("name", ["../../escaped", "a/b", "a\nb", "x" * 300], ids=["escape", "slash", "break", "long"])
def test_an_arm_does_not_write_outside_its_folder(refused, comparison, key, name):
    assert f"the name of an arm, its family and label, {RULE}" in refused(
        "evaluate", "steering", comparison(**{key: name})
    )


def test_arms_whose_results_would_have_one_name_are_refused(refused, comparison):
    arms = "arms=[{family: a, label: b-c, method: fk, recipe: r}, {family: a, label: b c, method: fk, recipe: r}]"
    assert "where a space and a hyphen count as equal" in refused("evaluate", "steering", comparison(), arms)


def test_a_seed_that_is_too_large_for_a_file_name(refused, comparison):
    assert "seeds must be below 2^63" in refused("evaluate", "steering", comparison(), f"seeds=[{10**300}]")


@pytest.mark.parametrize(
    ("overrides", "culprit"),
    [
        (
            ["rewards=[{kind: function, function: 'miniature.measures:../x'}]"],
            "the name of a reward of kind 'function'",
        ),
        (["rewards=[{kind: value, value_model: ..}]"], "the name of a reward of kind 'value'"),
        (["evaluation.metrics=['miniature.measures:a/b']"], "the name of a metric in evaluation.metrics"),
        (["out=runs/" + "x" * 300], "a folder in out"),
        (['out="runs/a\\tb"'], "a folder in out"),
    ],
)
def test_names_in_a_training_recipe(refused, overrides, culprit):
    assert f"{culprit} {RULE}" in refused("nft", RECIPE, *overrides)


def test_a_run_folder_of_a_stitching_recipe(refused):
    line = refused("stitch", "recipes/stitch/shapes_aesthetic.yaml", 'out="runs/a\\nb"')
    assert f"a folder in out {RULE}" in line


def test_an_index_of_weights_names_files_of_its_own_folder(tmp_path):
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(InputError, match=f"a file named in .*index.json {RULE}"):
        list(read_weights(tmp_path, ["a"]))


def test_a_manifest_names_files_of_its_own_folder(tmp_path):
    (tmp_path / checkpoint.MANIFEST).write_text('{"../other.safetensors": "0"}')
    assert f"a name in its manifest {RULE}" in checkpoint.damage(tmp_path)
