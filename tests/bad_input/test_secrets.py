"""Secrets of the environment do not get into what a run or an export writes, nor into an error."""

import pytest

import nft.export.card
from nft.config import load_recipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.recipe import dump
from stitchvm_reward.runs.run_folder import write_recipe
from stitchvm_reward.secrets import refuse_secrets, refuse_secrets_in, secrets
from tests.tiny import RECIPE

VALUE = "hf_QmlnU2VjcmV0"
variables = pytest.mark.parametrize(
    "name", ["HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_SECRET", "db_password"]
)


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    return VALUE


@pytest.fixture
def told(refused):
    """told("nft", argument, ...) -> the one line of a refusal, without the secret."""

    def run(*arguments):
        line = refused(*arguments)
        assert VALUE not in line
        return line

    return run


@pytest.mark.parametrize(
    "value",
    [
        "runs/${oc.env:HF_TOKEN}",
        "${oc.env:HOME}",
        "${oc.decode:x}",
        "${${prompts.column}:HF_TOKEN}",
        "${oc.${prompts.column}:HF_TOKEN}",
        "${oc.select:seed}",
    ],
)
def test_a_recipe_reads_no_environment_and_calls_no_function(secret, told, tmp_path, value):
    rule = "must not read the environment or call functions"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: {tmp_path}/base.yaml\n")
    (tmp_path / "base.yaml").write_text(f"out: '{value}'\nrewards: []\n")
    assert f"base.yaml {rule}" in told("nft", path)
    (tmp_path / "base.yaml").write_text(f"rewards: [{{kind: a:b, options: {{deep: ['{value}']}}}}]\n")
    assert f"base.yaml {rule}" in told("nft", path)
    assert f"an override {rule}" in told("nft", RECIPE, f"out='{value}'")


def test_a_recipe_may_name_another_of_its_keys():
    recipe = load_recipe(RECIPE, ["out=runs/${seed}-${prompts.column}/${rollout.steps}", "seed=7"])
    assert recipe.out == f"runs/7-text/{recipe.rollout.steps}"


@variables
def test_a_secret_in_a_recipe_is_refused_before_it_is_read(told, monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, VALUE)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"out: run\nrewards: [{{kind: 'a:B', options: {{key: {VALUE}}}}}\n")  # not valid either
    assert f"recipe.yaml must not contain secrets: the value of the environment variable {name}" in told("nft", path)
    line = told("nft", RECIPE, f"out=runs/{VALUE}")
    assert f"an override must not contain secrets: the value of the environment variable {name}" in line


def test_a_secret_that_is_put_together_is_not_written(secret, tmp_path):
    parts = [f"out={tmp_path}/${{prompts.column}}${{prompts.split}}", f"prompts.column={VALUE[:7]}"]
    recipe = load_recipe(RECIPE, [*parts, f"prompts.split={VALUE[7:]}"])
    for write in (dump, write_recipe):
        with pytest.raises(InputError, match=r"a recipe must not contain secrets: .*HF_TOKEN") as refusal:
            write(recipe)
        assert VALUE not in str(refusal.value)
    assert not any(path.is_file() and VALUE in path.read_text() for path in tmp_path.rglob("*"))


def test_other_variables_and_short_values_are_no_secrets(monkeypatch):
    for name, value in {"TOKENIZERS_PARALLELISM": "disabled", "HF_TOKEN": "none", "TOKEN_COUNT": VALUE}.items():
        monkeypatch.setenv(name, value)
        assert name not in secrets()
    refuse_secrets(f"none disabled {VALUE}", "a text")


@pytest.mark.parametrize("option", ["--title", "--author", "--license"])
def test_a_secret_in_the_texts_of_an_export(told, secret, trained_run, tmp_path, option):
    line = told("export", trained_run[1], "--out", tmp_path / "out", option, f"by {VALUE}")
    assert f"{option} must not contain secrets: the value of the environment variable HF_TOKEN" in line


def test_a_folder_with_a_secret_is_not_uploaded(secret, tmp_path, monkeypatch):
    monkeypatch.setattr(nft.export.card.HfApi, "create_repo", lambda *_, **__: pytest.fail("it was uploaded"))
    (tmp_path / "README.md").write_text(f"by {VALUE}")
    with pytest.raises(InputError, match=r"README.md must not contain secrets: the value of HF_TOKEN is in it") as told:
        nft.export.card.push(tmp_path, "someone/shapes")
    assert VALUE not in str(told.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(nft.export.card, "get_token", lambda: VALUE)
    with pytest.raises(InputError, match=r"README.md must not contain secrets: the value of the login to the hub"):
        nft.export.card.push(tmp_path, "someone/shapes")


@pytest.mark.parametrize("place", [0, 5_000_000])
def test_files_of_any_kind_are_searched_whole(tmp_path, place):
    (tmp_path / "deep").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "deep/weights.safetensors").write_bytes(b"\xff" * place + VALUE.encode() + b"\xff")
    refuse_secrets_in(tmp_path, {})
    with pytest.raises(InputError, match=r"weights.safetensors must not contain secrets: the value of the login"):
        refuse_secrets_in(tmp_path, {"the login": VALUE})
