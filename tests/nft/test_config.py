"""Recipes: merged, checked, and refused with one helpful line."""

from pathlib import Path

import pytest
import yaml

from nft.config import load_recipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import FLUX, SD3
from stitchvm_reward.runs.recipe import dump

ROOT = Path(__file__).parents[2]
MINIMAL = {
    "out": "run",
    "model": {"path": "model"},
    "prompts": {"train": "train.txt", "held_out": "held_out.txt"},
    "rewards": [{"kind": "clip", "model": "clip"}],
}


@pytest.fixture
def write(tmp_path):
    def write_recipe(content, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write_recipe


@pytest.fixture
def load(write):
    def load_content(content=MINIMAL, *overrides):
        return load_recipe(write(content), list(overrides))

    return load_content


def refused(load, *message, content=MINIMAL, overrides=()):
    with pytest.raises(InputError) as caught:
        load(content, *overrides)
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in message), text


def test_a_minimal_recipe_gets_the_published_defaults(load):
    recipe = load()
    assert (recipe.rollout.groups, recipe.rollout.group_size, recipe.rollout.solver) == (48, 24, "euler")
    assert (recipe.lora.rank, recipe.lora.alpha) == (32, 64)
    assert recipe.lora.targets == [] and len(SD3.lora_targets) == len(FLUX.lora_targets) == 8  # the family's own
    assert recipe.rewards[0].kind == "clip" and recipe.rewards[0].weight == 1.0


POLICIES = [path for path in sorted(ROOT.glob("recipes/**/*.yaml")) if path.parent.name not in ("stitch", "steer")]


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_shipped_recipes_load_or_are_bases(path):
    if path.stem == "base":
        with pytest.raises(InputError, match=r"must also set out|must list at least one"):
            load_recipe(path)
    else:
        assert load_recipe(path).rewards


def test_a_recipe_is_read_over_its_bases(write):
    write(MINIMAL | {"epochs": 7, "train": {"beta": 0.5, "warmup": 3}}, "first.yaml")
    write({"base": "first.yaml", "train": {"beta": 0.25}}, "second.yaml")
    rewards = [{"kind": "function", "function": "a.b:c"}]
    recipe = load_recipe(write({"base": "second.yaml", "rewards": rewards}))
    assert (recipe.epochs, recipe.train.beta, recipe.train.warmup) == (7, 0.25, 3)
    assert [reward.name for reward in recipe.rewards] == ["c"]


def test_a_base_is_found_relative_to_its_child(tmp_path, write):
    (tmp_path / "deeper").mkdir()
    write(MINIMAL)
    child = write({"base": "../recipe.yaml", "epochs": 2}, "deeper/child.yaml")
    assert load_recipe(child).epochs == 2


def test_overrides_win(load):
    recipe = load(MINIMAL | {"epochs": 7}, "epochs=3", "train.beta=.5", "train.per_group_std=true", "out=elsewhere")
    assert (recipe.epochs, recipe.train.beta, recipe.train.per_group_std, recipe.out) == (3, 0.5, True, "elsewhere")


def test_a_list_can_be_overridden(load):
    recipe = load(MINIMAL, "lora.targets=[attn.to_q]", "rewards=[{kind: function, function: 'a:b'}]")
    assert recipe.lora.targets == ["attn.to_q"] and recipe.rewards[0].name == "b"


def test_a_dumped_recipe_loads_as_the_same(load):
    recipe = load(MINIMAL, "train.learning_rate=1e-5", "seed=4")
    assert load(dump(recipe)) == recipe


@pytest.mark.parametrize(
    "extra, overrides, key, near",
    [
        ({"epoch": 3}, (), "epoch", "epochs"),
        ({"train": {"betta": 0.5}}, (), "train.betta", "beta"),
        ({"rewards": [{"kind": "clip", "model": "clip", "wieght": 2}]}, (), "rewards[0].wieght", "weight"),
        ({}, ("rollout.grops=3",), "rollout.grops", "groups"),
        ({}, ("modle.path=x",), "modle", "model"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(load, extra, overrides, key, near):
    refused(load, f"unknown recipe key {key}", f"did you mean '{near}'?", content=MINIMAL | extra, overrides=overrides)


def test_an_unknown_key_in_a_base_is_refused(write):
    write({"rollot": {}}, "base.yaml")
    with pytest.raises(InputError, match=r"rollot.*'rollout'"):
        load_recipe(write(MINIMAL | {"base": "base.yaml"}))


@pytest.mark.parametrize(
    "override, message",
    [
        ("epochs=many", "recipe key epochs: Value 'many'"),
        ("epochs=2.5", "recipe key epochs: Value '2.5'"),
        ("epochs=null", "recipe key epochs: Incompatible value 'None'"),
        ("train.beta=[1]", "recipe key train.beta: Value '[1]'"),
        ("train.per_group_std=perhaps", "recipe key train.per_group_std: Value 'perhaps' is not a valid bool"),
        ("model=5", "model must be a section with keys, got 5"),
        ("rewards=clip", "rewards must be a list, got 'clip'"),
        ("rewards=[clip]", "recipe key rewards[0]: Invalid type"),
        ("lora.targets=attn.to_q", "lora.targets must be a list, got 'attn.to_q'"),
        ("seed={a: 1}", "recipe key seed: Value"),
    ],
)
def test_a_wrong_type_is_refused_by_key(load, override, message):
    refused(load, message, overrides=[override])


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "epochs=0",
        "model.dtype=float8",
        "model.resolution=500",
        "model.resolution=0",
        "model.text_length=0",
        "rollout.groups=0",
        "rollout.group_size=1",
        "rollout.micro_batch=0",
        "rollout.steps=1",
        "rollout.solver=heun",
        "lora.rank=0",
        "lora.alpha=0",
        "train.updates_per_epoch=0",
        "train.updates_per_epoch=1153",
        "train.micro_batch=0",
        "evaluation.micro_batch=1.5",
        "rollout.micro_batch=largest",
        "train.levels=some",
        "train.levels_per_sample=0",
        "train.levels_per_sample=11",
        "train.space=pixel",
        "train.beta=0",
        "train.beta=1.5",
        "train.beta=.nan",
        "train.beta_kl=-1",
        "train.old_schedule=3",
        "train.learning_rate=0",
        "train.learning_rate=.nan",
        "train.learning_rate=.inf",
        "train.warmup=-1",
        "train.weight_decay=-0.1",
        "train.max_gradient_norm=0",
        "train.ema_decay=1",
        "evaluation.every=-1",
        "evaluation.samples=1",
        "evaluation.steps=0",
        "evaluation.grid=0",
        "evaluation.grid=129",
        "evaluation.metrics=[checker]",
        "checkpoint.every=0",
        "checkpoint.keep=0",
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(load, override):
    refused(load, override.partition("=")[0], overrides=[override])


@pytest.mark.parametrize(
    "rewards, message",
    [
        ([], "at least one reward"),
        (
            [{"kind": "magic", "model": "x"}],
            "rewards.kind must be package.module:Class or one of aesthetic, clip, dfn_clip, hpsv2, pickscore, "
            "function, value, got 'magic'",
        ),
        ([{"kind": "clip"}], "needs model"),
        ([{"kind": "pickscore"}], "a reward of kind pickscore needs model"),
        ([{"kind": "aesthetic", "model": "x"}], "needs head"),
        ([{"kind": "function", "function": "module"}], "package.module:function"),
        ([{"kind": "clip", "model": "x"}] * 2, "a name of its own"),
        ([{"kind": "clip", "model": "x", "weight": float("nan")}], "rewards.weight"),
        ([{"kind": "function", "function": "module:total"}], "total"),
    ],
)
def test_incomplete_rewards_are_refused(load, rewards, message):
    refused(load, message, content=MINIMAL | {"rewards": rewards})


def test_a_lone_sample_per_group_is_refused_with_the_reason(load):
    refused(load, "rollout.group_size must be at least 2", "no advantage", "got 1", overrides=["rollout.group_size=1"])


def test_more_levels_than_solver_steps_are_refused_on_the_grid_alone(load):
    overrides = ["rollout.steps=4", "train.levels_per_sample=5"]
    refused(load, "train.levels_per_sample must be at most the 4 solver levels", "got 5", overrides=overrides)
    assert load(MINIMAL, *overrides, "train.levels=continuous").train.levels_per_sample == 5


def test_all_missing_mandatory_keys_are_listed_at_once(load):
    rewards = {"rewards": MINIMAL["rewards"]}
    refused(load, "model.path", "out", "prompts.held_out", "prompts.train", content=rewards)


def test_a_missing_recipe_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"recipe not found: .*nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_a_missing_base_is_named(load):
    refused(load, "recipe not found", "parent.yaml", content=MINIMAL | {"base": "parent.yaml"})


@pytest.mark.parametrize(
    "base, message",
    [
        ("recipe.yaml", "is its own base; a base must be another file"),
        (5, "base must be a file name, got 5 in "),
        (["recipe.yaml"], "base must be a file name, got ['recipe.yaml'] in "),
    ],
)
def test_a_base_that_cannot_be_one_is_refused(load, base, message):
    refused(load, message, content=MINIMAL | {"base": base})


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("out: café".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_recipe(path)


@pytest.mark.parametrize(
    "content, message",
    [
        ("out: [", "is not valid YAML: while parsing a flow node"),
        ("a: b: c", "is not valid YAML: mapping values are not allowed"),
        ("- just\n- a list", "must hold recipe keys, got ['just', 'a list']"),
        ("words", "unknown recipe key words"),
        ("", "the recipe must also set model.path, out, prompts.held_out, prompts.train"),
        ("out: ${nothing}", "recipe key out: Interpolation key 'nothing' not found"),
        ("\x00", "is not valid YAML: unacceptable character"),
    ],
)
def test_a_recipe_that_is_no_recipe_is_refused(load, content, message):
    refused(load, message, content=content)


@pytest.mark.parametrize(
    "override, message",
    [
        ("epochs", "an override is written key=value, got 'epochs'"),
        ("=3", "an override is written key=value, got '=3'"),
        ("epochs=", "recipe key epochs: Incompatible value 'None'"),
        ("epochs=[", "the value of override 'epochs=[' is not valid YAML"),
        (".=1", "unknown recipe key : known: audit"),
        ("train..beta=1", "unknown recipe key train.: known: beta"),
        ("train[=1", "train must be a section with keys, got 1"),
    ],
)
def test_a_malformed_override_is_refused(load, override, message):
    refused(load, message, overrides=[override])


VALUE = [{"kind": "value", "value_model": "runs/stitch/some/value_model"}]


@pytest.mark.parametrize("window", ["[2,4]", "[3,2]", "[0,2]", "[2]", "[1,2,3]"])
def test_a_stop_window_outside_the_schedule_or_reaching_its_last_step_is_refused(load, window):
    content = MINIMAL | {"rewards": VALUE, "rollout": {"steps": 4}}
    overrides = [f"rollout.stop_window={window}"]
    refused(load, "rollout.stop_window must be [first, last]", content=content, overrides=overrides)


def test_stop_windows_and_value_models_need_each_other(load):
    refused(load, "need each other", overrides=["rollout.stop_window=[2,3]", "rollout.steps=4"])
    refused(load, "need each other", content=MINIMAL | {"rewards": VALUE})
    window = MINIMAL | {"rollout": {"steps": 4, "stop_window": [2, 3]}}
    refused(load, "need each other", content=window | {"rewards": [*MINIMAL["rewards"], *VALUE]})
    assert load(window | {"rewards": VALUE}).rewards[0].name == "some"
    levels = ["train.levels_per_sample=3"]
    refused(load, "at most the 2 solver levels", content=window | {"rewards": VALUE}, overrides=levels)
    refused(load, "audit.every must be 0", overrides=["audit.every=2"])
