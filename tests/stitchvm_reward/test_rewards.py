"""Rewards on small random models, and the mistakes of files and of users' functions."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from miniature import wording
from miniature.images import write
from stitchvm_reward import hub
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards import FunctionReward, RewardRecipe, check_finite, find_function, load_reward
from stitchvm_reward.rewards.aesthetic import AestheticHead, AestheticReward, load_head
from stitchvm_reward.rewards.clip import FITS, TEXT_KINDS, ClipReward, load_clip
from stitchvm_reward.rewards.preprocess import normalise

WIDTH = 16
CPU = torch.device("cpu")
PROMPTS = ["a red circle on white", "two blue crosses on black", "a red circle on white"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = wording.clip_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": wording.LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = size | {"image_size": 32, "patch_size": 8}
    folder = tmp_path_factory.mktemp("clip")
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make_head(width=WIDTH, seed=0):
    torch.manual_seed(seed)
    return AestheticHead(width).eval()


def test_clip_reward_is_the_cosine_of_the_models_own_embeddings(clip_folder, images):
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), wording.clip_tokenizer()
    tokens = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        direct = model(input_ids=tokens, pixel_values=normalise(images))
    expected = torch.cosine_similarity(direct.image_embeds, direct.text_embeds)
    scores = ClipReward(clip_folder, "clip", CPU).score(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_clip_reward_embeds_each_text_once(clip_folder, images):
    reward = ClipReward(clip_folder, "clip", CPU)
    reward.score(images, PROMPTS)
    kept = dict(reward.texts._known)
    assert list(kept) == PROMPTS[:2]
    reward.score(images, [PROMPTS[1], "a green square on grey", PROMPTS[0]])
    assert len(reward.texts._known) == 3 and all(
        reward.texts._known[text] is embedding for text, embedding in kept.items()
    )


def test_clip_reward_cuts_a_text_that_is_too_long(clip_folder, images):
    assert ClipReward(clip_folder, "clip", CPU).score(images[:1], ["red " * 50]).isfinite().all()


def test_clip_reward_is_differentiable_in_the_pixels_alone(clip_folder, images):
    reward = ClipReward(clip_folder, "clip", CPU)
    reward.score(images.requires_grad_(), PROMPTS).sum().backward()
    assert images.grad.isfinite().all() and images.grad.any()
    assert not any(parameter.requires_grad for parameter in reward.tower.clip.parameters())


def test_folder_without_a_clip_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a CLIP model"):
        ClipReward(str(tmp_path), "clip", CPU)


def test_folder_with_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(InputError, match="not a CLIP model"):
        ClipReward(str(tmp_path), "clip", CPU)


@pytest.mark.parametrize(
    "lost, content, message",
    [
        ("model.safetensors", None, "is not a CLIP model folder: OSError: Error no file named model.safetensors"),
        ("model.safetensors", b"not it", "is not a CLIP model folder: SafetensorError: "),
        ("tokenizer.json", None, r"has no tokenizer \(tokenizer.json, or "),
        ("tokenizer.json", b"not it", "the tokenizer in .* cannot be read: Expecting value"),
    ],
    ids=["no weights", "damaged weights", "no tokenizer", "damaged tokenizer"],
)
def test_clip_folder_with_a_lost_file_is_refused(clip_folder, tmp_path, lost, content, message):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / lost).unlink() if content is None else (folder / lost).write_bytes(content)
    with pytest.raises(InputError, match=message):
        ClipReward(str(folder), "clip", CPU)


@pytest.fixture
def tall():
    """Pictures that are not square, so that the kinds see them differently."""
    return torch.rand(3, 3, 64, 40, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_every_text_kind_is_the_scaled_cosine_of_what_its_tower_sees(clip_folder, tall, kind):
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), wording.clip_tokenizer()
    tokens = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        direct = model(input_ids=tokens, pixel_values=normalise(FITS[kind](tall, 32)))
    scale = float(model.logit_scale.detach().exp()) / 26 if kind == "pickscore" else 1.0
    expected = scale * torch.cosine_similarity(direct.image_embeds, direct.text_embeds)
    reward = load_reward(RewardRecipe(kind=kind, model=clip_folder), CPU)
    torch.testing.assert_close(reward.score(tall, PROMPTS), expected, rtol=1e-5, atol=1e-6)


def test_kinds_that_fit_pictures_differently_score_them_differently(clip_folder, tall, images):
    rewards = {kind: ClipReward(clip_folder, kind, CPU) for kind in ("clip", "dfn_clip", "hpsv2")}
    on_tall = [reward.score(tall, PROMPTS) for reward in rewards.values()]
    on_square = [reward.score(images, PROMPTS) for reward in rewards.values()]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(on_tall[first], on_tall[second], atol=1e-4)
        assert torch.equal(on_square[first], on_square[second])


def test_pickscore_has_its_published_scale(clip_folder, images):
    reward, plain = (ClipReward(clip_folder, kind, CPU) for kind in ("pickscore", "clip"))
    assert reward.texts.scale == pytest.approx(float(reward.tower.clip.logit_scale.exp()) / 26)
    # published: logit_scale is log 100, and DiffusionNFT divides by 26
    reward.tower.clip.logit_scale.fill_(4.6051702)
    reward.texts = type(reward.texts)(reward.tower.clip, reward.tower.folder, "pickscore")
    assert reward.texts.scale == pytest.approx(3.8461538)
    torch.testing.assert_close(reward.score(images, PROMPTS), plain.score(images, PROMPTS) * 3.8461538)


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_a_pairs_score_does_not_depend_on_its_company(clip_folder, tall, kind):
    reward = ClipReward(clip_folder, kind, CPU)
    alone = torch.cat([reward.score(tall[n : n + 1], PROMPTS[n : n + 1]) for n in range(3)])
    torch.testing.assert_close(reward.score(tall, PROMPTS), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:2], []])
def test_pictures_without_a_prompt_each_are_refused(clip_folder, images, prompts):
    with pytest.raises(InputError, match=rf"against its own prompt, got 3 and {len(prompts)}"):
        ClipReward(clip_folder, "clip", CPU).score(images, prompts)


@pytest.mark.parametrize("model", ["HPS_v2.1_compressed.pt", "weights/HPS_v2.1_compressed.pt", "model.safetensors"])
@pytest.mark.parametrize("there", [True, False])
def test_a_file_of_weights_is_answered_with_the_command_that_converts_it(tmp_path, monkeypatch, model, there):
    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / "weights").mkdir()
        (tmp_path / model).write_bytes(b"")
    command = f"python -m stitchvm_reward.rewards.open_clip {model} OUT --tokenizer FOLDER_OR_HUB_ID"
    with pytest.raises(InputError) as caught:
        load_reward(RewardRecipe(kind="hpsv2", model=model), CPU)
    assert command in str(caught.value) and "\n" not in str(caught.value)


def pickled(folder, tmp_path, change=lambda state: state):
    """A copy of a CLIP folder with its weights as pytorch_model.bin, as some are published."""
    copied = shutil.copytree(folder, tmp_path / "pickled")
    (copied / "model.safetensors").unlink()
    torch.save(change(dict(CLIPModel.from_pretrained(folder).state_dict())), copied / "pytorch_model.bin")
    return str(copied)


def test_a_folder_that_only_has_pickled_tensors_is_read(clip_folder, tmp_path, images):
    reward = ClipReward(pickled(clip_folder, tmp_path), "clip", CPU)
    assert torch.equal(reward.score(images, PROMPTS), ClipReward(clip_folder, "clip", CPU).score(images, PROMPTS))


@pytest.mark.parametrize("safe", [True, False])
def test_pickled_weights_are_fetched_only_where_there_are_no_others(clip_folder, tmp_path, monkeypatch, safe):
    published, fetched = Path(clip_folder if safe else pickled(clip_folder, tmp_path)), tmp_path / "fetched"
    if safe:
        published = shutil.copytree(published, tmp_path / "both")
        (published / "pytorch_model.bin").write_bytes(b"never asked for")
    fetched.mkdir()

    def download(model, allow_patterns, ignore_patterns):
        names = [path.name for path in published.iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copyfile(published / name, fetched / name)
        return str(fetched)

    monkeypatch.setattr(hub, "snapshot_download", download)
    clip, _ = load_clip("somebody/clip", CPU)
    assert torch.equal(clip.visual_projection.weight, load_clip(clip_folder, CPU)[0].visual_projection.weight)
    assert (fetched / "pytorch_model.bin").exists() != safe


def test_code_in_pickled_weights_is_refused_and_not_run(clip_folder, tmp_path):
    sign = tmp_path / "executed"
    folder = pickled(clip_folder, tmp_path, lambda state: state | {"logit_scale": Code(sign)})
    with pytest.raises(InputError, match="not a CLIP model folder") as caught:
        load_clip(folder, CPU)
    assert not sign.exists() and "\n" not in str(caught.value)


def test_published_head_layout_is_read():
    keys = [f"layers.{index}.{part}" for index in (0, 2, 4, 6, 7) for part in ("weight", "bias")]
    assert list(make_head().state_dict()) == keys
    shapes = [tuple(tensor.shape) for key, tensor in make_head(768).state_dict().items() if key.endswith("weight")]
    assert shapes == [(1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)]


PUBLISHED = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


@pytest.mark.parametrize("name", ["sac+logos+ava1-l14-linearMSE.pth", "head.safetensors"])
def test_a_file_with_the_published_heads_keys_and_shapes_scores_as_its_matrices_say(tmp_path, name):
    generator = torch.Generator().manual_seed(3)
    state = {}
    for index, shape in PUBLISHED.items():
        state[f"layers.{index}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        state[f"layers.{index}.bias"] = torch.randn(shape[0], generator=generator)
    path = tmp_path / name
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    embeddings = expected = torch.randn(4, 768, generator=generator)
    for index in PUBLISHED:  # nothing but matrices: dropout is off and there are no activations
        expected = expected @ state[f"layers.{index}.weight"].T + state[f"layers.{index}.bias"]
    torch.testing.assert_close(load_head(str(path))(embeddings), expected[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["model.safetensors", "aesthetic-model.pth"])
@pytest.mark.parametrize("given_as_folder", [False, True])
def test_head_loads_from_either_format(tmp_path, name, given_as_folder):
    head, path = make_head(), tmp_path / name
    save_file(head.state_dict(), path) if name.endswith("safetensors") else torch.save(head.state_dict(), path)
    loaded = load_head(str(tmp_path if given_as_folder else path))
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in head.state_dict().items())
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_aesthetic_reward_applies_the_head_to_normalised_embeddings(clip_folder, tmp_path, images):
    head = make_head()
    save_file(head.state_dict(), tmp_path / "model.safetensors")
    reward = AestheticReward(clip_folder, str(tmp_path), CPU)
    with torch.no_grad():
        embedded = CLIPModel.from_pretrained(clip_folder).eval()(
            input_ids=torch.zeros(3, 2, dtype=torch.long), pixel_values=normalise(images)
        )
        expected = head(embedded.image_embeds)
    scores = reward.score(images, PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


class Code:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_code_in_a_pickled_head_is_refused_and_not_run(tmp_path, writer):
    path, sign = tmp_path / "aesthetic-model.pth", tmp_path / "executed"
    writer({"layers.0.weight": Code(sign)}, path)
    with pytest.raises(InputError, match="not an aesthetic head"):
        load_head(str(path))
    assert not sign.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"not a model", os.urandom(500)], ids=["empty", "text", "noise"])
def test_a_file_that_is_no_head_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"head{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not an aesthetic head"):
        load_head(str(path))


@pytest.mark.parametrize(
    "content", [{"other": torch.ones(2)}, torch.ones(3, 3), [1, 2]], ids=["keys", "tensor", "list"]
)
def test_tensors_of_another_layout_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(InputError, match="not an aesthetic head"):
        load_head(str(tmp_path / "head.pth"))


def test_head_folder_without_a_head_is_refused(tmp_path):
    with pytest.raises(InputError, match="no aesthetic head in"):
        load_head(str(tmp_path))


def test_head_of_another_width_is_refused(clip_folder, tmp_path):
    save_file(make_head(768).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"width 768, .* gives 16"):
        AestheticReward(clip_folder, str(tmp_path), CPU)


USER = """
import torch
number = 5
def good(images, prompts): return images.mean((1, 2, 3)).double()
def matrix(images, prompts): return torch.zeros(len(prompts), 1)
def words(images, prompts): return [0.0] * len(prompts)
def raises(images, prompts): raise RuntimeError("no display")
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "users_rewards.py").write_text(USER)
    (tmp_path / "users_typo.py").write_text("def score(images, prompts:")
    (tmp_path / "users_crash.py").write_text("raise RuntimeError('no display')")
    monkeypatch.syspath_prepend(tmp_path)
    return "users_rewards"


def test_a_users_function_scores_in_float32(user, images):
    scores = FunctionReward(f"{user}:good").score(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, images.mean((1, 2, 3)))


@pytest.mark.parametrize(
    "function, message",
    [
        ("matrix", r"matrix must return a tensor of shape \(3,\), got \(3, 1\)"),
        ("words", r"words must return a tensor of shape \(3,\), got list"),
        ("raises", "raises raised RuntimeError: no display"),
    ],
)
def test_a_users_faulty_function_is_told_by_name(user, images, function, message):
    with pytest.raises(InputError, match=f"{user}:{message}"):
        FunctionReward(f"{user}:{function}").score(images, PROMPTS)


@pytest.mark.parametrize("name", ["users_rewards:none", "users_rewards:number", "no_such_module:f", "users_rewards"])
def test_a_function_that_is_not_there_is_told_by_name(user, name):
    with pytest.raises(InputError, match=name):
        find_function(name)


@pytest.mark.parametrize("name", ["users_typo:score", "users_crash:score", ":score", ".users_rewards:good"])
def test_a_module_that_cannot_be_imported_is_told_by_name(user, name):
    with pytest.raises(InputError, match=name):
        find_function(name)


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="aesthetic, clip, dfn_clip, hpsv2, pickscore, function, value, got 'magic'"):
        RewardRecipe(kind="magic")


def test_scores_that_are_not_finite_are_told_by_name():
    check_finite("clip", torch.tensor([0.1, -3.0]))
    with pytest.raises(InputError, match="reward clip gave 2 of 3"):
        check_finite("clip", torch.tensor([float("nan"), 0.5, float("-inf")]))


@pytest.mark.slow
def test_a_reward_in_bfloat16_ranks_images_as_in_float32_and_has_a_gradient(tmp_path):
    write(256, tmp_path)
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(tmp_path.glob("*.png"))]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    scores = []
    for dtype in ("float32", "bfloat16"):
        recipe = RewardRecipe(model="miniature/weights/clip", head="miniature/weights/aesthetic", dtype=dtype)
        reward = load_reward(recipe, CPU)
        assert isinstance(reward, AestheticReward) and reward.tower.clip.dtype == getattr(torch, dtype)
        with torch.no_grad():
            scores.append(reward.score(images, []))
    assert scores[1].dtype == torch.float32 and not torch.equal(*scores)
    ranks = torch.stack([score.argsort().argsort().double() for score in scores])
    assert torch.corrcoef(ranks)[0, 1] >= 0.999
    given = images[:2].clone().requires_grad_()
    reward.score(given, []).sum().backward()
    assert given.grad is not None and given.grad.isfinite().all() and given.grad.any()


def test_a_dtype_of_a_reward_that_has_none_is_refused():
    with pytest.raises(InputError, match=r"rewards\.dtype must be one of float32, bfloat16"):
        RewardRecipe(model="m", head="h", dtype="float16")
    with pytest.raises(InputError, match="kind value has no dtype to choose"):
        RewardRecipe(kind="value", value_model="folder", dtype="bfloat16")
