"""Conversion of open_clip's layout, against a forward pass written out here in plain torch."""

import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel

from miniature import wording
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards.architectures import CLIPS
from stitchvm_reward.rewards.clip import ClipReward, ImageTower, TextTower
from stitchvm_reward.rewards.open_clip import convert, convert_file, main

CPU = torch.device("cpu")
PROMPTS = ["a red circle on white", "two blue crosses", "a"]
VOCABULARY = 203  # the miniature's tokenizer


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, heads, activation):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        parts = [("c_fc", nn.Linear(width, 4 * width)), ("act", activation()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, heads, layers, activation):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, width, heads, layers, side, patch, projection, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers, activation)
        self.proj = nn.Parameter(torch.empty(width, projection))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """Two plain pre-norm transformers under the names that open_clip gives their tensors."""

    def __init__(self, activation=nn.GELU, vision=(192, 3, 2, 32, 8), text=(128, 2, 3, VOCABULARY, 13), projection=48):
        super().__init__()
        width, heads, layers, vocabulary, length = text
        self.visual = Vision(*vision, projection, activation)
        self.transformer = Transformer(width, heads, layers, activation)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, projection))
        self.logit_scale = nn.Parameter(torch.tensor(3.5))
        self.register_buffer("attn_mask", torch.full((length, length), float("-inf")).triu(1))

    def encode_text(self, tokens):
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, self.attn_mask)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


def randomised(model):
    """Every tensor drawn: what is zero or one as made would hide what is lost."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                start = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
                parameter.copy_(start + 0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    wording.clip_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def state():
    return {name: tensor.clone() for name, tensor in randomised(OpenClip()).state_dict().items()}


@pytest.fixture
def saved(tmp_path):
    def write(content, name="weights.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def as_open_clip(prompts):
    """Token ids as open_clip makes them: zeros after the end mark."""
    tokens = wording.clip_tokenizer()(prompts, padding="max_length", return_tensors="pt").input_ids
    ended = (tokens == VOCABULARY - 1).cumsum(1)
    return torch.where((ended == 0) | ((ended == 1) & (tokens == VOCABULARY - 1)), tokens, 0)


@pytest.mark.parametrize(("name", "activation"), [("gelu", nn.GELU), ("quick_gelu", QuickGELU)])
def test_a_converted_model_gives_the_same_embeddings(name, activation, saved, tokenizer, tmp_path):
    model = randomised(OpenClip(activation))
    convert_file(saved(model.state_dict()), tmp_path / "out", tokenizer, name)
    tower = ImageTower(str(tmp_path / "out"), "hpsv2", CPU)
    texts = TextTower(tower.clip, tower.folder, "hpsv2")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model.visual(tower.pixels(images))
        found = tower.clip.get_image_features(pixel_values=tower.pixels(images)).pooler_output
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tower.embed(images), F.normalize(wanted, dim=-1), rtol=1e-5, atol=1e-5)
        wanted = F.normalize(model.encode_text(as_open_clip(PROMPTS)), dim=-1)
        torch.testing.assert_close(texts.embed(PROMPTS), wanted, rtol=1e-5, atol=1e-5)
    assert float(tower.clip.logit_scale) == 3.5


def test_the_activation_makes_a_difference_that_would_be_seen(saved, tokenizer, tmp_path):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    path, embedded = saved(randomised(OpenClip()).state_dict()), []
    for activation in ("gelu", "quick_gelu"):
        convert_file(path, tmp_path / activation, tokenizer, activation)
        embedded.append(ImageTower(str(tmp_path / activation), "clip", CPU).embed(images))
    assert float((embedded[0] - embedded[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {"state_dict": state, "epoch": 3, "name": "run"},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {name: tensor for name, tensor in state.items() if name != "attn_mask"},
        lambda state: state | {"logit_scale": state["logit_scale"].reshape(1)},
        lambda state: state | {"context_length": torch.tensor(13), "input_resolution": torch.tensor(32)},
    ],
    ids=["wrapped", "module", "without mask", "scale of one", "buffers"],
)
def test_the_layouts_variants_give_the_same_folder(change, state, saved, tokenizer, tmp_path):
    convert_file(saved(state), tmp_path / "plain", tokenizer)
    convert_file(saved(change(state), "changed.pt"), tmp_path / "changed", tokenizer)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "changed" / name).read_bytes()


def test_safetensors_are_read_and_half_precision_is_kept(state, tokenizer, tmp_path):
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, tmp_path / "weights.safetensors")
    convert_file(tmp_path / "weights.safetensors", tmp_path / "out", tokenizer)
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    assert ClipReward(str(tmp_path / "out"), "hpsv2", CPU).tower.clip.dtype == torch.float32


def test_the_folder_is_one_that_the_library_and_the_rewards_load(state, saved, tokenizer, tmp_path):
    convert_file(saved(state), tmp_path / "out", tokenizer)
    _, told = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    scores = ClipReward(str(tmp_path / "out"), "pickscore", CPU).score(torch.rand(3, 3, 40, 24), PROMPTS)
    assert scores.shape == (3,) and scores.isfinite().all()


@pytest.mark.parametrize(
    ("known", "heads"), [("adams-story/HPSv2-hf", 80), ("openai/clip-vit-large-patch14-336", 64)], ids=["H", "L"]
)
def test_published_sizes_are_told_from_shapes_alone(known, heads):
    wanted = CLIPS[known]
    vision, text = wanted["vision_config"], wanted["text_config"]
    depth = ("num_attention_heads", "num_hidden_layers")
    with torch.device("meta"):
        model = OpenClip(
            vision=(vision["hidden_size"], *(vision[key] for key in depth), vision["image_size"], vision["patch_size"]),
            text=(text["hidden_size"], *(text[key] for key in depth), 49408, 77),
            projection=wanted["projection_dim"],
        )
    config, tensors = convert(without("attn_mask")(model.state_dict()), vision["hidden_act"])
    for name, part in (("vision_config", vision), ("text_config", text)):
        found = getattr(config, name).to_dict()
        assert {key: found[key] for key in part} == part
    assert config.vision_config.hidden_size // config.vision_config.num_attention_heads == heads
    assert config.projection_dim == wanted["projection_dim"]
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in model.parameters())


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def swapped(name, tensor):
    return lambda state: state | {name: tensor}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("visual.proj"), "missing: visual.proj;"),
        (without("visual.conv1.weight"), "missing: visual.conv1.weight;"),
        (without("transformer.resblocks.1.attn.in_proj_bias"), "missing: transformer.resblocks.1.attn.in_proj_bias;"),
        (lambda s: {k: v for k, v in s.items() if "resblocks" not in k}, "missing: visual.transformer.resblocks.0;"),
        (lambda s: {k: v for k, v in s.items() if "resblocks.0." not in k}, "resblocks.0"),
        (swapped("visual.head.weight", torch.ones(2)), "unknown: visual.head.weight;"),
        (swapped("logit_bias", torch.ones(())), "unknown: logit_bias;"),
        (
            lambda s: s | {f"extra.{n}": torch.ones(1) for n in range(9)},
            "unknown: extra.0, extra.1, extra.2 and 6 more;",
        ),
        (swapped("text_projection", torch.ones(128, 40)), r"text_projection must have shape (128, 48)"),
        (swapped("transformer.resblocks.0.attn.in_proj_weight", torch.ones(385, 128)), "must have shape (384, 128)"),
        (swapped("visual.positional_embedding", torch.ones(12, 192)), "one more than a square of positions, got 12"),
        (swapped("visual.positional_embedding", torch.ones(0, 192)), "one more than a square of positions, got 0"),
        (swapped("visual.conv1.weight", torch.ones(192, 3, 8)), "visual.conv1.weight must have 4 dimensions"),
        (
            swapped("visual.conv1.weight", torch.ones(100, 3, 8, 8)),
            "must be a multiple of 64, its heads' width, got 100",
        ),
        (swapped("visual.conv1.weight", "text"), "visual.conv1.weight is a str"),
        (lambda s: [1, 2], "must hold named tensors, got a list"),
        (lambda s: {"model": s}, "model is a dict"),
    ],
)
def test_what_cannot_be_converted_is_named_and_nothing_is_written(change, told, state, saved, tokenizer, tmp_path):
    path = saved(change(state))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        convert_file(path, tmp_path / "out", tokenizer)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


class Code:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_the_command_refuses_code_and_does_not_run_it(state, saved, tokenizer, tmp_path):
    sign = tmp_path / "executed"
    path = saved(state | {"visual.proj": Code(sign)})
    command = [sys.executable, "-m", "stitchvm_reward.rewards.open_clip", str(path), str(tmp_path / "out")]
    done = subprocess.run([*command, "--tokenizer", tokenizer], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not sign.exists() and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert (
        "cannot be read as tensors, and code in it is never run" in done.stderr
        and "weights_only=False" not in done.stderr
    )


@pytest.fixture
def refuses(monkeypatch, capsys):
    def run(*arguments, told):
        monkeypatch.setattr(sys, "argv", ["open_clip", *map(str, arguments)])
        assert main() == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and told in lines[0], lines

    return run


@pytest.mark.parametrize("content", [b"", b"not weights", bytes(range(256)) * 4], ids=["empty", "text", "bytes"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_holds_no_weights_is_refused(content, suffix, refuses, tokenizer, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    refuses(
        path, tmp_path / "out", "--tokenizer", tokenizer, told="cannot be read as tensors, and code in it is never run"
    )
    assert not (tmp_path / "out").exists()


def test_paths_that_cannot_be_used_are_refused(state, saved, refuses, tokenizer, tmp_path):
    path = saved(state)
    refuses(tmp_path / "none.pt", tmp_path / "out", "--tokenizer", tokenizer, told="no such file")
    refuses(path, tmp_path / "out", "--tokenizer", tmp_path / "none", told="model folder not found")
    refuses(path, tmp_path / "out", "--tokenizer", tmp_path, told="has no tokenizer")
    refuses(path, path / "out", "--tokenizer", tokenizer, told="cannot write")
    (tmp_path / "out").mkdir()
    refuses(path, tmp_path / "out", "--tokenizer", tokenizer, told="already exists")


def test_the_command_says_what_it_wrote(state, saved, tokenizer, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "out"
    monkeypatch.setattr(sys, "argv", ["open_clip", str(saved(state)), str(out), "--tokenizer", tokenizer])
    assert main() == 0
    assert (
        "vision 2 blocks of width 192, 32 px in patches of 8; text 3 blocks of width 128; gelu"
        in capsys.readouterr().out
    )
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in Path(out.parent).iterdir()] == ["out"]


def test_a_tokenizer_that_reads_texts_elsewhere_is_refused(state, saved, tokenizer, tmp_path):
    larger = wording.clip_tokenizer()
    larger.add_tokens(["<later>"])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(InputError, match=r"203 entries, as the model does, the last one the end token; .* has 204"):
        convert_file(saved(state), tmp_path / "out", str(tmp_path / "larger"))
    state["token_embedding.weight"] = torch.randn(204, 128)  # now it has the entries, and the end mark is not the last
    with pytest.raises(InputError, match="its end token is number 202"):
        convert_file(saved(state), tmp_path / "out", str(tmp_path / "larger"))
    assert not (tmp_path / "out").exists()
