"""What launch/export.py writes is what was trained, or nothing."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nft.export.card
import nft.export.files
import nft.export.lora
from nft.config import load_recipe
from nft.export.card import FORMATS, Texts
from nft.export.files import export
from nft.export.lora import LORA_NAME
from nft.export.trained import read_trained
from nft.policy import ADAPTERS, Policy
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import SD3, architecture_of
from stitchvm_reward.runs import checkpoint, randomness
from stitchvm_reward.runs.recipe import DTYPES, CheckpointRecipe, dump

MODEL = "miniature/weights/sd3"
LAYERS = 8 * 6 - 1  # eight projections a block; the last block's text stream has no output projection
INDICES = [0, 1, 2]


def pipeline(**parts):
    return StableDiffusion3Pipeline.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True, **parts)


def adapted(network):
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}


def load(kind, folder):
    """A pipeline with an export of that kind, loaded as its card tells."""
    if kind == "merged":
        return pipeline(transformer=SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer"))
    found = pipeline()
    if kind == "peft":
        found.transformer = PeftModel.from_pretrained(found.transformer, folder)
    else:
        found.load_lora_weights(str(folder), weight_name=LORA_NAME)
    return found


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def trained(trained_run):
    return read_trained(trained_run[1])


@pytest.fixture(scope="module")
def picture(trained_run, sampled):
    """picture(pipeline) -> held-out pictures of it, from the noise that the trainer's own have."""
    trainer, _ = trained_run
    prompts = [trainer.held_out.prompts[n] for n in INDICES]
    noise = randomness.noise((16, 8, 8), trainer.recipe.seed, randomness.EVALUATION, 0, INDICES)
    return lambda pipeline: sampled(pipeline, prompts, noise, 2)


@pytest.fixture(scope="module")
def base_pictures(picture):
    return picture(pipeline())


@pytest.mark.parametrize("kind", FORMATS)
def test_images_of_an_export_are_those_of_the_trained_policy(
    kind, trained_run, trained, picture, base_pictures, tmp_path
):
    trainer, _ = trained_run
    layers, deviation = export(trained, kind, None, tmp_path / "out", Texts())
    assert layers == LAYERS and deviation < 1e-5
    sampler = load(kind, tmp_path / "out")
    assert len(adapted(sampler.transformer)) == (0 if kind == "merged" else LAYERS)
    found, expected = picture(sampler), trainer.held_out.images("ema", INDICES)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert float((found - base_pictures).abs().max()) > 0.05, "an export that did nothing would pass otherwise"


def test_the_current_weights_are_others_than_the_averaged_ones(trained_run, trained, picture, tmp_path):
    trainer, folder = trained_run
    current = read_trained(folder, "current")
    assert any(not torch.equal(current.matrices[key], trained.matrices[key]) for key in trained.matrices)
    export(current, "comfyui", None, tmp_path / "out", Texts())
    found = picture(load("comfyui", tmp_path / "out"))
    torch.testing.assert_close(found, trainer.held_out.images("current", INDICES), atol=1e-4, rtol=0)
    assert float((found - trainer.held_out.images("ema", INDICES)).abs().max()) > 1e-3


def test_the_runs_own_file_holds_the_same_tensors(trained_run, trained, tmp_path):
    export(trained, "comfyui", None, tmp_path / "out", Texts())
    ours, theirs = load_file(tmp_path / "out" / LORA_NAME), load_file(trained_run[1] / "lora.safetensors")
    assert ours.keys() == theirs.keys() and len(ours) == 2 * LAYERS
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(key.startswith("transformer.") and key.endswith(("lora_A.weight", "lora_B.weight")) for key in ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_cast_verifies_and_is_written(kind, dtype, trained, tmp_path):
    _, deviation = export(trained, kind, dtype, tmp_path / "out", Texts())
    most = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 0.1}[dtype]
    assert deviation < most and (kind != "merged" or deviation > 0)
    (file,) = (tmp_path / "out").rglob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_without_its_scale_does_not_verify_and_leaves_no_file(kind, trained, tmp_path, monkeypatch):
    unscaled = dict.fromkeys(trained.scaling, 1.0)  # it is 2
    true_tensors, true_config = nft.export.lora.lora_tensors, nft.export.files.LoraConfig
    if kind == "comfyui":
        monkeypatch.setattr(
            nft.export.lora, "lora_tensors", lambda matrices, scaling, dtype: true_tensors(matrices, unscaled)
        )
    elif kind == "peft":
        monkeypatch.setattr(
            nft.export.files, "LoraConfig", lambda **given: true_config(**given | {"lora_alpha": given["r"]})
        )
    else:
        trained = replace(trained, scaling=unscaled)
    with pytest.raises(InputError, match=r"export is wrong and was removed: .* the delta of .* is off by"):
        export(trained, kind, None, tmp_path / "deeper" / "out", Texts())
    assert tree(tmp_path) == {}


def change_one_number(path):
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("5.attn.to_q.lora_B.weight"))
    tensors[key][3, 1] *= 1.001
    save_file(tensors, path)


def drop_a_layer(path):
    save_file({key: tensor for key, tensor in load_file(path).items() if ".2.attn.to_q." not in key}, path)


def rename_a_layer(path):
    save_file({key.replace(".2.attn.to_q.", ".2.attn.to_z."): t for key, t in load_file(path).items()}, path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (change_one_number, "the delta of transformer_blocks.5.attn.to_q is off"),
        (drop_a_layer, f"adapts {LAYERS - 1} layers, the policy {LAYERS}"),
        (rename_a_layer, f"holds {LAYERS} layers and diffusers attached {LAYERS - 1}"),
        (cut_short, "cannot be read"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_a_file_that_is_damaged_on_disk_is_found_out_and_removed(damage, told, trained, tmp_path, monkeypatch):
    true_save = nft.export.files.save_lora

    def damaged(path, *arguments):
        true_save(path, *arguments)
        damage(path)

    monkeypatch.setattr(nft.export.files, "save_lora", damaged)
    with pytest.raises(InputError, match=told):
        export(trained, "comfyui", None, tmp_path / "out", Texts())
    assert tree(tmp_path) == {}


def test_a_merged_folder_in_which_another_weight_changed_is_found_out(trained, tmp_path, monkeypatch):
    true_write = nft.export.files.write_merged

    def damaged(folder, *arguments):
        true_write(folder, *arguments)
        file = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors["proj_out.bias"][0] += 1e-3
        save_file(tensors, file)

    monkeypatch.setattr(nft.export.files, "write_merged", damaged)
    with pytest.raises(InputError, match=r"proj_out\.bias is not the base's"):
        export(trained, "merged", None, tmp_path / "out", Texts())
    assert tree(tmp_path) == {}


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_the_header_tells_what_the_file_is(trained_run, trained, tmp_path):
    texts = Texts("Brighter shapes", "apache-2.0", "A. Painter")
    export(trained, "comfyui", None, tmp_path / "out", texts)
    manifest = trained_run[1] / "checkpoints" / "epoch-000002" / "manifest.json"
    date = datetime.fromtimestamp(manifest.stat().st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert header(tmp_path / "out" / LORA_NAME) == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "Brighter shapes",
        "modelspec.resolution": "64x64",
        "modelspec.date": date,
        "modelspec.license": "apache-2.0",
        "modelspec.author": "A. Painter",
        "modelspec.description": "LoRA adapters of rank 4 by reinforcement (stitch-nft), recipe shapes-run, "
        "reward 1 x aesthetic, epoch 2",
    }
    own = header(trained_run[1] / "lora.safetensors")
    assert own["modelspec.title"] == "stitch-nft shapes-run" and "modelspec.architecture" not in own


@pytest.mark.parametrize(("size", "layers"), [("medium", 191), ("large", 303)])
def test_an_export_for_sd35_needs_none_of_its_weights_and_names_its_architecture(size, layers, tmp_path):
    settings = ["lora.rank=1", "lora.alpha=2", f"model.path=stabilityai/stable-diffusion-3.5-{size}"]
    recipe = load_recipe("recipes/aesthetic_pixel.yaml", [*settings, f"out={tmp_path}/run"])
    with torch.device("meta"):
        network = SD3Transformer2DModel.from_config(architecture_of(recipe.model.path).transformer)
        shapes = Policy(network, 1, 2, SD3.lora_targets, 0).tensors("ema")
    adapters = {f"{name}/{key}": torch.full(t.shape, 0.01) for name in ADAPTERS for key, t in shapes.items()}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump(recipe))
    state = {"epoch": 10, "learner": {"step": 10}}
    checkpoint.save(tmp_path / "run" / "checkpoints", 10, {"adapters": adapters}, state, CheckpointRecipe())
    trained = read_trained(tmp_path / "run")
    assert len(trained.scaling) == layers and set(trained.scaling.values()) == {2.0}
    found = nft.export.lora.lora_header(recipe, trained.config, 10, trained.date)
    assert found["modelspec.architecture"] == f"stable-diffusion-v3.5-{size}/lora"
    assert found["modelspec.license"] == "stabilityai-ai-community" and found["modelspec.resolution"] == "512x512"


def test_the_card_tells_base_reward_recipe_figures_and_use(trained_run, trained, tmp_path):
    export(trained, "comfyui", None, tmp_path / "out", Texts(title="Brighter shapes", license="apache-2.0"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {"lora", "text-to-image"} <= set(card.data.tags)
    assert card.data.library_name == "diffusers" and card.data.license == "apache-2.0"
    assert card.text.lstrip().startswith("# Brighter shapes")
    rows = [json.loads(line) for line in (trained_run[1] / "metrics.jsonl").read_text().splitlines()]
    for name in ("aesthetic", "checker", "checker_share", "true_aesthetic"):
        before, after = rows[0][f"held_out/{name}"], rows[-1][f"held_out/{name}"]
        assert f"| {name} | {before:.3f} | {after:.3f} | {after - before:+.3f} |" in card.text
    for part in (MODEL, "1 x aesthetic", "rank 4, alpha 8, 47 layers", "ema of epoch 2 (4 optimizer steps)"):
        assert part in card.text
    assert dump(trained.recipe).rstrip() in card.text
    assert f'load_lora_weights("THIS_FOLDER", weight_name="{LORA_NAME}")' in card.text and "models/loras" in card.text
    for name in ("curves.png", "before_after.png"):
        assert (tmp_path / "out" / name).read_bytes() == (trained_run[1] / name).read_bytes()
        assert f"]({name})" in card.text


def test_the_card_of_a_run_that_did_not_finish_does_without_its_pictures(trained_run, tmp_path):
    run = shutil.copytree(trained_run[1], tmp_path / "run", ignore=shutil.ignore_patterns("*.png", "metrics.jsonl"))
    export(read_trained(run), "comfyui", None, tmp_path / "out", Texts())
    text = (tmp_path / "out" / "README.md").read_text()
    assert ".png" not in text and "Held out" not in text and "## Recipe" in text


def test_a_named_checkpoint_is_exported_with_its_own_figures(trained_run, trained, tmp_path):
    earlier = read_trained(trained_run[1], "ema", "epoch-000001")
    assert earlier.epoch == 1 and trained.epoch == 2
    export(earlier, "comfyui", None, tmp_path / "out", Texts())
    assert "| measure | epoch 0 | epoch 1 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_command_writes_the_comfyui_layout_into_the_run_and_tells_what_it_verified(launched, trained_run, tmp_path):
    run = shutil.copytree(trained_run[1], tmp_path / "run")
    code, out, _ = launched("export", run)
    assert code == 0 and f"{LAYERS} layers" in out
    written = {path.name for path in (run / "export" / "comfyui").iterdir()}
    assert written == {LORA_NAME, "README.md", "curves.png", "before_after.png"}
    first = (run / "export" / "comfyui" / LORA_NAME).read_bytes()
    assert launched("export", run, "--weights", "current", "--replace")[0] == 0
    assert (run / "export" / "comfyui" / LORA_NAME).read_bytes() != first
    assert not list(run.rglob("*.staged"))


@pytest.fixture
def refused(launched, tmp_path):
    """refused(message parts, *arguments) checks that the command refuses in one line and changes nothing."""

    def run(parts, *arguments):
        before = tree(tmp_path)
        code, out, error = launched("export", *arguments)
        assert code == 2 and out == "" and len(error.splitlines()) == 1, error
        assert error.startswith("error: ") and all(part in error for part in parts), error
        assert tree(tmp_path) == before

    return run


def test_unknown_formats_weights_and_dtypes_are_refused(refused, trained_run, tmp_path):
    for option, known in (("--format", "comfyui, peft, merged"), ("--weights", "ema, current"), ("--dtype", "float32")):
        refused(
            [f"{option} must be one of {known}", "'none'"], trained_run[1], "--out", tmp_path / "out", option, "none"
        )


def test_a_folder_that_is_no_run_is_refused(refused, tmp_path):
    refused(["is not a run folder", "it has no recipe.yaml"], tmp_path)
    refused(["is not a run folder"], tmp_path / "nowhere")


def test_a_run_without_a_checkpoint_and_an_unknown_one_are_refused(refused, trained_run, tmp_path):
    run = shutil.copytree(trained_run[1], tmp_path / "run")
    refused(["checkpoint epoch-000007 is not in", "epoch-000002"], run, "--checkpoint", "epoch-000007")
    shutil.rmtree(run / "checkpoints")
    refused(["has no checkpoint yet"], run)


def test_damaged_checkpoints_are_refused(refused, trained_run, tmp_path):
    run = shutil.copytree(trained_run[1], tmp_path / "run")
    for file in run.glob("checkpoints/*/adapters.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    refused(["is damaged", "adapters.safetensors is altered"], run, "--checkpoint", "epoch-000002")


def test_adapters_of_another_rank_than_the_recipes_are_refused(refused, trained_run, tmp_path):
    run = shutil.copytree(trained_run[1], tmp_path / "run")
    saved = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(saved.replace("rank: 4", "rank: 8"))
    refused(["another rank, other layers"], run)


def test_a_folder_that_exists_is_left_as_it_is(refused, launched, trained_run, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for more in ((), ("--replace",)):
        refused(["is no export of ours", "another --out"], trained_run[1], "--out", taken, *more)
    assert launched("export", trained_run[1], "--out", tmp_path / "ours")[0] == 0
    refused(["exists; add --replace"], trained_run[1], "--out", tmp_path / "ours")


def test_an_out_that_cannot_be_written_is_refused(refused, trained_run, tmp_path):
    (tmp_path / "file").write_text("kept")
    refused(["cannot write", "file/out"], trained_run[1], "--out", tmp_path / "file" / "out")


def test_a_push_without_a_login_or_a_name_is_refused_before_anything_is_written(
    refused, trained_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(nft.export.card, "get_token", lambda: None)
    out = ("--out", tmp_path / "out")
    refused(["hf auth login"], trained_run[1], *out, "--push", "someone/shapes")
    for name in ("shapes", "a/b/c", "some one/shapes"):
        refused(["user/name", f"'{name}'"], trained_run[1], *out, "--push", name)
    refused(["--public", "--push"], trained_run[1], *out, "--public")


@pytest.mark.parametrize("more", [(), ("--public",)])
def test_push_makes_a_private_repository_unless_told_and_uploads_the_folder(
    more, launched, trained_run, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(nft.export.card, "get_token", lambda: "token")
    monkeypatch.setattr(
        nft.export.card.HfApi,
        "create_repo",
        lambda self, name, **given: calls.append((name, given)) or f"https://hub/{name}",
    )
    monkeypatch.setattr(
        nft.export.card.HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, **_: calls.append((repo_id, sorted(p.name for p in folder_path.iterdir()))),
    )
    code, out, _ = launched("export", trained_run[1], "--out", tmp_path / "out", "--push", "someone/shapes", *more)
    assert code == 0 and "https://hub/someone/shapes" in out
    assert calls == [
        ("someone/shapes", {"private": not more, "exist_ok": True}),
        ("someone/shapes", ["README.md", "before_after.png", "curves.png", LORA_NAME]),
    ]
    assert 'load_lora_weights("someone/shapes"' in (tmp_path / "out" / "README.md").read_text()


def test_an_upload_that_fails_leaves_the_export_and_says_so(launched, trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(nft.export.card, "get_token", lambda: "token")

    def refuse(self, name, **given):
        raise OSError("the hub is away")

    monkeypatch.setattr(nft.export.card.HfApi, "create_repo", refuse)
    code, _, error = launched("export", trained_run[1], "--out", tmp_path / "out", "--push", "someone/shapes")
    assert code == 2 and "is written but was not uploaded to someone/shapes: the hub is away" in error
    assert (tmp_path / "out" / LORA_NAME).is_file()
