"""A run whose value model is not built yet: told, built in the same command, resumed wherever it was killed."""

import glob
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nft.config import load_recipe
from nft.preflight import check_recipe
from nft.value_models import build_plan, missing
from stitchvm_reward.errors import InputError
from tests.tiny import EARLY, ROOT

RECIPE = "recipes/shapes/from_nothing.yaml"
STITCH = """
base: {root}/recipes/stitch/shapes_generated.yaml
out: unused
backbone: {{block: 2}}
reward: {{block: 1}}
data:
  generate: {{images: 160, steps: 2}}
  held_out: 8
  cache: {folder}/targets
search: {{probe: 24, held_out: 8, last_reward_block: 1}}
finetune: {{epochs: 3, batch: 16, micro_batch: 8, warmup: 2}}
evaluation: {{sigmas: [0.25]}}
checkpoint: {{every: 1}}
"""
PATIENCE = 300  # seconds


def stitched(folder: Path, name: str = "value_model", resolution: int = 64) -> tuple[str, ...]:
    """Return overrides for a run in `folder` whose value model is built there by a small recipe of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = STITCH.format(root=ROOT, folder=folder) + f"model: {{resolution: {resolution}}}\n"
    (folder / "stitch.yaml").write_text(recipe)
    reward = f"{{kind: value, value_model: {folder}/built/{name}, stitch: {folder}/stitch.yaml}}"
    return f"rewards=[{reward}]", *EARLY


def test_what_a_run_will_build_is_in_its_plan(launched, overrides, tmp_path):
    code, out, error = launched("nft", RECIPE, *overrides(tmp_path / "run", *stitched(tmp_path)), "--dry-run")
    assert code == 0, error
    first, second, third, *_ = out.splitlines()
    assert first == f"value model  {tmp_path}/built/value_model is missing: built first, by {tmp_path}/stitch.yaml"
    assert second.strip() == "160 images drawn of miniature/prompts/train.txt, 2 steps, guidance 1, 3 epochs"
    assert third.strip().startswith("draw images ") and "GPU-hours" in third
    (tmp_path / "built/value_model").mkdir(parents=True)
    assert build_plan(load_recipe(RECIPE, overrides(tmp_path / "run", *stitched(tmp_path)))) == []


def test_a_run_with_a_recipe_for_its_missing_value_model_may_start(overrides, tmp_path):
    recipe = load_recipe(RECIPE, overrides(tmp_path / "run", *stitched(tmp_path)))
    check_recipe(recipe)
    assert [stitch.out for stitch in missing(recipe).values()] == [f"{tmp_path}/built"]
    assert not (tmp_path / "run").exists() and not (tmp_path / "built").exists()


def test_shipped_recipes_name_the_recipe_that_writes_their_value_model():
    for path in sorted((ROOT / "recipes").glob("**/*.yaml")):
        if path.parent.name in ("steer", "stitch") or "stitch:" not in path.read_text():
            continue
        for reward in load_recipe(path).rewards:
            assert f"out: {Path(reward.value_model).parent}" in (ROOT / reward.stitch).read_text().splitlines(), path


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"resolution": 128}, r"stitch\.yaml is for 128 px, model\.resolution is 64"),
        ({"name": "mine"}, r"to be built by .*stitch\.yaml it must be called OUT/value_model"),
    ],
)
def test_a_build_that_does_not_fit_is_refused_before_anything_is_loaded(overrides, tmp_path, settings, told):
    recipe = load_recipe(RECIPE, overrides(tmp_path / "run", *stitched(tmp_path, **settings)))
    with pytest.raises(InputError, match=told):
        check_recipe(recipe)
    assert not (tmp_path / "run").exists() and not (tmp_path / "built").exists()


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ("{kind: value, value_model: /nowhere/value_model}", "name the recipe that builds it as the reward's stitch"),
        ("{kind: value, value_model: /nowhere/value_model, stitch: /no.yaml}", "recipe not found: /no.yaml"),
    ],
)
def test_a_missing_value_model_without_a_recipe_is_an_error(overrides, tmp_path, reward, told):
    given = stitched(tmp_path)
    recipe = load_recipe(RECIPE, overrides(tmp_path / "run", *given, f"rewards=[{reward}]"))
    with pytest.raises(InputError, match=told):
        check_recipe(recipe)


def test_only_a_value_model_has_a_recipe_that_builds_it(overrides, tmp_path):
    reward = "{kind: clip, model: miniature/weights/clip, stitch: recipes/stitch/shapes_clip.yaml}"
    with pytest.raises(InputError, match="only a reward of kind value has stitch"):
        load_recipe("recipes/shapes/aesthetic.yaml", overrides(tmp_path / "run", f"rewards=[{reward}]"))


def _start(command: list[str], log: Path) -> subprocess.Popen:
    with log.open("ab") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)


def _killed_once_there_is(command: list[str], log: Path, pattern: Path) -> None:
    """Start a command and kill it as soon as a file of this pattern exists."""
    process, end = _start(command, log), time.monotonic() + PATIENCE
    while not glob.glob(str(pattern)) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    assert process.poll() is None, log.read_text()[-3000:]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(PATIENCE)


@pytest.mark.slow
def test_one_command_builds_and_trains_and_goes_on_to_the_same_bits_wherever_it_was_killed(
    overrides, tmp_path, digests, rows
):
    def command(folder: Path) -> list[str]:
        given = [*overrides(folder / "run", *stitched(folder)), "epochs=1"]
        return [sys.executable, "launch/nft.py", RECIPE, *given]

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    log = tmp_path / "log"
    assert _start(command(straight), log).wait(PATIENCE) == 0, log.read_text()[-3000:]
    told = log.read_text()
    assert "is missing: built first, by" in told and told.index("built first") < told.index("chosen: backbone block 2")
    assert len(list((straight / "targets").glob("generated-*/latents-*.safetensors"))) == 5
    whole = command(killed)
    stitched(killed)
    _killed_once_there_is(whole, log, killed / "targets" / "generated-*" / "latents-000001.safetensors")
    drawn = list((killed / "targets").glob("generated-*/latents-*.safetensors"))
    assert 0 < len(drawn) < 5 and not (killed / "built").exists()
    _killed_once_there_is(whole, log, killed / "built/checkpoints/epoch-000001/manifest.json")
    assert not (killed / "built/value_model").exists()
    assert _start(whole, log).wait(PATIENCE) == 0, log.read_text()[-3000:]
    for name in ("value_model/model.safetensors", "search.json"):
        assert (killed / "built" / name).read_bytes() == (straight / "built" / name).read_bytes(), name
    assert rows(killed / "built") == rows(straight / "built")
    assert digests(killed / "run", 1) == digests(straight / "run", 1)
    assert rows(killed / "run") == rows(straight / "run")
