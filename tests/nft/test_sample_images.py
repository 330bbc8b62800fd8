"""Seeded pictures, base beside tuned."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nft.evaluation.sample import Sampler, gather_prompts, sample_all
from nft.export.card import Texts
from nft.export.files import export
from nft.export.lora import LORA_NAME
from nft.export.trained import read_trained
from stitchvm_reward.errors import InputError

MODEL = "miniature/weights/sd3"
PROMPTS = ["a red cross, white background", "two green circles on black", "purple square, white background"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for kind in ("comfyui", "peft"):
        export(read_trained(trained_run[1]), kind, None, folder / kind, Texts())
    return folder


@pytest.fixture(scope="module")
def lora(exported):
    return exported / "comfyui" / LORA_NAME


@pytest.fixture(scope="module")
def sampler(lora):
    return Sampler(MODEL, lora, torch.float32, CPU)


def test_tuned_pictures_are_the_trained_policys_and_base_ones_the_bases(sampler, trained_run):
    trainer, _ = trained_run
    indices = [0, 1, 2]
    found = sampler.images([trainer.held_out.prompts[n] for n in indices], indices, seed=trainer.recipe.seed, steps=2)
    for name, adapter in (("base", None), ("tuned", "ema")):
        torch.testing.assert_close(found[name], trainer.held_out.images(adapter, indices), atol=1e-4, rtol=0)
    assert float((found["base"] - found["tuned"]).abs().max()) > 0.05


def test_neither_the_batch_nor_the_other_prompts_change_a_picture(sampler):
    whole = sample_all(sampler, PROMPTS, batch=3, seed=4, steps=2)
    single = sample_all(sampler, PROMPTS, batch=1, seed=4, steps=2)
    fewer = sample_all(sampler, PROMPTS[:2], batch=8, seed=4, steps=2)
    for name in ("base", "tuned"):
        torch.testing.assert_close(whole[name], single[name], atol=1e-4, rtol=0)
        torch.testing.assert_close(whole[name][:2], fewer[name], atol=1e-4, rtol=0)
    other = sample_all(sampler, PROMPTS[:1], batch=1, seed=5, steps=2)
    assert float((other["base"] - whole["base"][:1]).abs().max()) > 0.1


def test_without_a_lora_there_is_only_the_base_at_the_models_own_size(tmp_path, launched):
    code, out, error = launched(
        *("sample", MODEL, "--prompts", *PROMPTS[:2], "--steps", 1, "--grid", tmp_path / "grid.png")
    )
    assert code == 0 and "2 prompts at 64 px" in out, error
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (96 + 12, 20 + 2 * (96 + 32 + 6))


def test_the_grid_has_a_row_a_prompt_with_base_beside_tuned_and_the_folder_every_picture(lora, launched, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    code, out, error = launched(
        *("sample", MODEL, "--lora", lora, "--prompts", tmp_path / "prompts.txt", "a green cross", "--steps", 1),
        *("--grid", tmp_path / "grid.png", "--out", tmp_path / "single"),
    )
    assert code == 0 and "4 prompts at 64 px" in out and "47 layers" in out, error
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * (96 + 6) - 6 + 12, 20 + 4 * (96 + 32 + 6))
        left, right = (grid.convert("RGB").crop((x, 20, x + 96, 116)) for x in (6, 108))
    assert left.tobytes() != right.tobytes()
    names = sorted(path.name for path in (tmp_path / "single").iterdir())
    assert names == [f"{index:04d}-{name}.png" for index in range(4) for name in ("base", "tuned")]
    with Image.open(tmp_path / "single" / "0000-tuned.png") as picture:
        assert picture.size == (64, 64)
        assert picture.resize((96, 96), Image.Resampling.NEAREST).tobytes() == right.tobytes()


def test_size_count_and_rows_are_as_asked_for(lora, launched, tmp_path):
    code, out, error = launched(
        *("sample", MODEL, "--lora", lora, "--prompts", *PROMPTS, "--count", 2, "--across", 2, "--resolution", 48),
        *("--steps", 1, "--guidance", 2, "--grid", tmp_path / "grid.png"),
    )
    assert code == 0 and "2 prompts at 48 px" in out, error
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * (2 * (96 + 6) - 6 + 12), 20 + 96 + 32 + 6)


@pytest.mark.parametrize("method", ["best_of_n", "fk", "dps"])
def test_steered_pictures_stand_beside_plain_ones_from_the_same_noise(method, launched, tmp_path):
    usual = ("sample", MODEL, "--prompts", *PROMPTS, "--steering", "recipes/steer/shapes.yaml", "--steps", 4)
    small = ("--set", "fk.window=[1,3]", "fk.every=1", "fk.particles=3", "best_of_n.particles=3", "dps.strength=200")
    written = ("--grid", tmp_path / "grid.png", "--out", tmp_path / "single", "--trace", tmp_path / "trace.json")
    code, out, error = launched(*usual, "--steer", method, *small, *written)
    assert code == 0 and f"3 prompts at 64 px, seed 0, steered by {method}" in out, error
    names = sorted(path.name for path in (tmp_path / "single").iterdir())
    assert names == [f"{index:04d}-{name}.png" for index in range(3) for name in ("plain", "steered")]
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["prompts"] == PROMPTS and len(trace["trace"]) == 3
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * (96 + 6) - 6 + 12, 20 + 3 * (96 + 32 + 6))


def test_a_tuned_model_is_steered_with_its_adapters(lora, launched, tmp_path):
    usual = ("sample", MODEL, "--prompts", PROMPTS[0], "--steer", "dps", "--steering", "recipes/steer/shapes.yaml")
    small = ("--steps", 3, "--set", "dps.strength=0", "--grid", tmp_path / "grid.png")
    for name, more in (("base", ()), ("tuned", ("--lora", lora))):
        assert launched(*usual, *small, *more, "--out", tmp_path / name)[0] == 0
    pictures = [(tmp_path / name / "0000-steered.png").read_bytes() for name in ("base", "tuned")]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--steer", "fk"), "--steer needs --steering RECIPE"),
        (("--steering", "recipes/steer/shapes.yaml"), "--steering needs --steer METHOD"),
        (("--steer", "smc", "--steering", "recipes/steer/shapes.yaml"), "must be one of best_of_n, fk, dps, got 'smc'"),
        (("--steer", "fk", "--steering", "nowhere.yaml"), "recipe not found: nowhere.yaml"),
        (("--steer", "fk", "--batch", 2, "--steering", "recipes/steer/shapes.yaml"), "--batch is for plain sampling"),
    ],
)
def test_bad_steering_is_told_in_one_line(arguments, told, launched, tmp_path):
    usual = ("--prompts", "a red cross", "--grid", tmp_path / "grid.png")
    code, out, error = launched("sample", MODEL, *usual, *arguments)
    assert code == 2 and out == "" and len(error.splitlines()) == 1 and told in error, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "change", "told"),
    [
        ("fk", "fk.window=[8,32]", "fk.window must end within the schedule's 8 steps, got [8, 32]"),
        ("fk", "fk.window=[3,2]", "fk.window must be [first, last] with 1 <= first <= last, got [3, 2]"),
        ("fk", "fk.proposal_window=[4,8]", "fk.proposal_window must end before the last of 8 steps"),
        ("fk", "fk.proposal_window=[0,2]", "fk.proposal_window must be [first, last] with 1 <= first <= last"),
        ("fk", "fk.partciles=3", "unknown recipe key fk.partciles: did you mean 'particles'?"),
        ("fk", "fk.particles=0", "fk.particles must be at least 1"),
        ("fk", "fk.resampling=residual", "fk.resampling must be one of systematic, multinomial"),
        ("dps", "dps.window=[4,8]", "dps.window must lie within the schedule, steps 0 to 7"),
        ("dps", "dps.strength=.inf", "dps.strength must be finite"),
        ("dps", "dps.schedule=cosine", "dps.schedule must be one of constant, sigma, tilt"),
        ("dps", "estimate=monte_carlo", "dps needs a gradient: estimate must be tweedie"),
        ("best_of_n", "best_of_n.prune_at=8", "best_of_n.prune_at must lie within the schedule's 8 steps"),
        ("fk", "stochasticity=0", "fk.proposals must be 1 where stochasticity is 0"),
        ("fk", "rewards=[]", "rewards must list at least one reward"),
        ("fk", "rewards=[{kind: value, value_model: nowhere}]", "value model not found: nowhere"),
        ("fk", "fk.particles=100000000", "100000000 particles of 4 proposals must fit into memory"),
        ("dps", "dps.strength=1e30", "lower dps.strength, which is 1e+30"),
    ],
)
def test_settings_of_steering_that_do_not_fit_are_told_in_one_line(method, change, told, launched, tmp_path):
    usual = ("--prompts", "a red cross", "--grid", tmp_path / "grid.png", "--steering", "recipes/steer/shapes.yaml")
    code, out, error = launched("sample", MODEL, *usual, "--steer", method, "--set", change)
    assert code == 2 and out == "" and told in error.splitlines()[-1], error
    assert sum("error:" in line for line in error.splitlines()) == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_prompt_is_text_unless_it_ends_like_a_prompt_file(tmp_path):
    (tmp_path / "more.txt").write_text("a red circle\n\na blue square\n")
    long = "a very detailed picture " * 40
    assert gather_prompts(["one", str(tmp_path / "more.txt"), long]) == ["one", "a red circle", "a blue square", long]
    with pytest.raises(InputError, match=r"prompt file not found: nowhere\.txt"):
        gather_prompts(["nowhere.txt"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--steps", 0), "--steps must be at least 1, got 0"),
        (("--batch", 0), "--batch must be at least 1"),
        (("--count", 0), "--count must be at least 1"),
        (("--seed", -1), "--seed must be 0 or more"),
        (("--guidance", 0.5), "--guidance must be from 1"),
        (("--resolution", 50), "--resolution must be a multiple of 16, got 50"),
        (("--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (("--grid", "grid.bmp"), "--grid must end in .png"),
        (("--grid", "setup.cfg/grid.png"), "cannot write setup.cfg/grid.png"),
        (("--prompts", " "), "empty prompt"),
        (("--lora", "nowhere.safetensors"), "LoRA file not found: nowhere.safetensors"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, told, launched, tmp_path):
    usual = ("--prompts", "a red cross", "--grid", tmp_path / "grid.png")
    code, out, error = launched("sample", MODEL, *usual, *arguments)
    assert code == 2 and out == "" and len(error.splitlines()) == 1 and told in error
    assert not list(tmp_path.iterdir())


def test_files_of_which_diffusers_would_attach_less_than_they_hold_are_refused(exported, lora, launched, tmp_path):
    tensors = load_file(lora)
    save_file(
        {key.replace(".1.attn.to_q.", ".1.attn.to_z."): t for key, t in tensors.items()}, tmp_path / "a.safetensors"
    )
    save_file({key.removeprefix("transformer."): t for key, t in tensors.items()}, tmp_path / "b.safetensors")
    save_file(
        {key: t[:, :-1].contiguous() if "lora_A" in key else t for key, t in tensors.items()},
        tmp_path / "c.safetensors",
    )
    (tmp_path / "d.safetensors").write_text("no tensors")
    before = sorted(tmp_path.iterdir())
    for file, told in (
        (exported / "peft" / "adapter_model.safetensors", "is in PEFT's layout"),
        (tmp_path / "a.safetensors", "holds 47 layers and diffusers attached 46"),
        (tmp_path / "b.safetensors", "holds no transformer.LAYER.lora_A.weight"),
        (tmp_path / "c.safetensors", "does not fit this model"),
        (tmp_path / "d.safetensors", "cannot be read as safetensors"),
    ):
        code, out, error = launched(
            *("sample", MODEL, "--lora", file, "--prompts", "a red cross", "--grid", tmp_path / "grid.png")
        )
        assert code == 2 and out == "" and len(error.splitlines()) == 1 and told in error, (file, error)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_no_pipeline_is_refused(launched, tmp_path):
    usual = ("--prompts", "a red cross", "--grid", tmp_path / "grid.png")
    (tmp_path / "index").mkdir()
    shutil.copyfile(f"{MODEL}/model_index.json", tmp_path / "index/model_index.json")
    for model, told in (
        ("./nowhere", "model folder not found"),
        ("miniature/weights/clip", "is not a model folder: model_index.json is missing"),
        (tmp_path / "index", "has no autoencoder"),
    ):
        code, _, error = launched("sample", model, *usual)
        assert code == 2 and len(error.splitlines()) == 1 and told in error, error
