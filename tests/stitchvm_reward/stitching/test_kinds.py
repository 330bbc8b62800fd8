"""Every kind of reward can be stitched: cut anywhere, told apart in caches and folders, scored in one place."""

import json
import shutil

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from miniature import wording
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards.clip import FITS, TEXT_KINDS, ClipReward, ImageTower
from stitchvm_reward.rewards.tail import RewardTail, vision_states
from stitchvm_reward.stitching.benchmark import score_costs
from stitchvm_reward.stitching.config import load_stitch_recipe
from stitchvm_reward.stitching.value_model import StitchedValueModel

CPU = torch.device("cpu")
DEPTH = 3
CUT = ("backbone.block=1", "reward.block=1")  # spares the search
ACTIVATIONS = {"clip": "quick_gelu", "dfn_clip": "quick_gelu", "hpsv2": "gelu", "pickscore": "gelu"}
PROMPTS = ["a red circle on white", "two blue crosses on black"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(activation) -> a small random CLIP model with that activation."""

    def make(activation):
        path = tmp_path_factory.getbasetemp() / f"clip-{activation}"
        if not path.exists():
            torch.manual_seed(0)
            size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "hidden_act": activation}
            tokenizer = wording.clip_tokenizer()
            text = {"vocab_size": len(tokenizer), "max_position_embeddings": wording.LENGTH, "num_hidden_layers": 2}
            text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
            vision = {"image_size": 32, "patch_size": 8, "num_hidden_layers": DEPTH, "initializer_factor": 5.0}
            config = CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=16)
            CLIPModel(config).save_pretrained(path)
            tokenizer.save_pretrained(path)
        return str(path)

    return make


@pytest.mark.parametrize("first", range(1, DEPTH + 1))
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_a_tower_cut_at_any_block_completes_to_the_rewards_own_score(folder, kind, first):
    reward = ClipReward(folder(ACTIVATIONS[kind]), kind, CPU)
    image = torch.rand(1, 3, 48, 30, generator=torch.Generator().manual_seed(0))
    given = vision_states(reward.tower.clip, reward.tower.pixels(image), DEPTH)[first - 1]
    tail = RewardTail(reward.tower.clip, first).eval()
    if first > 1:  # beyond block 1 the class token is a constant: the true one, for the one image
        tail.set_start(given[0, 0], torch.zeros(16, 32))
        given = given[:, 1:]
    _, embedding = tail(given.transpose(1, 2).unflatten(2, (4, 4)))
    found = reward.texts.score(embedding, PROMPTS[:1])
    torch.testing.assert_close(found, reward.score(image, PROMPTS[:1]), rtol=1e-4, atol=1e-5)


def test_the_activation_reaches_the_tail(folder):
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embeddings = [ImageTower(folder(activation), "clip", CPU).embed(image) for activation in ("gelu", "quick_gelu")]
    assert float((embeddings[0] - embeddings[1]).abs().max()) > 1e-4


def with_kind(folder, kind, path):
    copied = shutil.copytree(folder, path)
    config = json.loads((copied / "config.json").read_text())
    config["reward"]["kind"] = kind
    (copied / "config.json").write_text(json.dumps(config))
    return copied


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_a_value_model_scores_in_the_units_of_its_kind(clip_folder, tmp_path, kind):
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = StitchedValueModel.from_pretrained(clip_folder)
    model = StitchedValueModel.from_pretrained(with_kind(clip_folder, kind, tmp_path / "value_model"))
    scale = float(plain.readout.clip.logit_scale.exp()) / 26 if kind == "pickscore" else 1.0
    torch.testing.assert_close(model.score(latents, 0.4, PROMPTS), scale * plain.score(latents, 0.4, PROMPTS))
    with pytest.raises(InputError, match="against its own prompt, got 2 and 1"):
        model.score(latents, 0.4, PROMPTS[:1])


def test_a_stitched_gelu_tower_keeps_its_kind_and_activation_in_its_folder(stitch, folder, tmp_path):
    sizes = ("backbone.block=1", "reward.block=2", "finetune.epochs=1")
    path = stitch("clip", tmp_path / "run", *sizes, "reward.kind=pickscore", f"reward.model={folder('gelu')}")
    config = json.loads((path / "config.json").read_text())
    assert config["reward"]["kind"] == "pickscore" and config["reward"]["vision"]["hidden_act"] == "gelu"
    model = StitchedValueModel.from_pretrained(path)
    assert type(model.network.tail.layers[0].mlp.activation_fn).__name__ == "GELUActivation"
    assert model.readout.scale == pytest.approx(float(model.readout.clip.logit_scale.exp()) / 26)
    assert model.score(torch.randn(2, 16, 8, 8), 0.5, PROMPTS).isfinite().all()


@pytest.fixture(scope="module")
def few_images(image_folder, tmp_path_factory):
    """What makes a search look at few images."""
    folder = tmp_path_factory.mktemp("few")
    for number in range(20):
        for path in image_folder.glob(f"{number:05d}.*"):
            shutil.copyfile(path, folder / path.name)
    return *CUT, "data.held_out=4", "search.probe=12", "search.held_out=4", f"data.images={folder}"


@pytest.mark.slow
def test_kept_targets_are_shared_by_kinds_that_see_the_same_and_by_no_others(stitch, few_images, tmp_path):
    cache = tmp_path / "cache"

    def kept(kind, number):
        base = "aesthetic" if kind == "aesthetic" else "clip"
        overrides = () if kind == "aesthetic" else (f"reward.kind={kind}",)
        stitch(base, tmp_path / f"run{number}", f"data.cache={cache}", *few_images, *overrides, only_search=True)
        return {path.name for path in cache.iterdir() if path.is_dir() and any(path.glob("shard-*"))}

    first = kept("clip", 0)
    assert len(first) == 1 and kept("aesthetic", 1) == first and kept("pickscore", 2) == first
    squashed = kept("dfn_clip", 3)
    assert len(squashed) == 2 and len(kept("hpsv2", 4)) == 3


@pytest.mark.slow
def test_kept_targets_of_another_activation_are_not_taken(stitch, few_images, folder, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(folder("gelu"), tmp_path / "clip")
    for number, activation in enumerate(("gelu", "quick_gelu")):
        config = json.loads((tmp_path / "clip/config.json").read_text())
        config["vision_config"]["hidden_act"] = activation
        (tmp_path / "clip/config.json").write_text(json.dumps(config))
        overrides = (*few_images, f"data.cache={cache}", f"reward.model={tmp_path / 'clip'}")
        stitch("clip", tmp_path / f"run{number}", *overrides, only_search=True)
    assert len([path for path in cache.iterdir() if any(path.glob("shard-*"))]) == 2


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_the_benchmarks_tweedie_score_fits_pictures_as_the_kind_does(monkeypatch, kind):
    fit, seen = FITS[kind], []
    monkeypatch.setitem(FITS, kind, lambda images, side: seen.append(side) or fit(images, side))
    recipe = load_stitch_recipe("recipes/stitch/shapes_clip.yaml", [f"reward.kind={kind}", "backbone.block=1"])
    score_costs(recipe, 1, 1, CPU)
    assert seen and set(seen) == {64}
