"""Value models: what they score, what they share, what they refuse."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stitchvm_reward.diffusion.backbone import BackboneHead, load_backbone
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.rewards.clip import load_clip
from stitchvm_reward.rewards.tail import RewardTail, vision_states
from stitchvm_reward.stitching.value_model import StitchedValueModel, load_value_models, score_all

CPU = torch.device("cpu")
MODEL = "miniature/weights/sd3"
PROMPTS = ["a red circle on white", "two blue squares on black"]


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator.load(ModelRecipe(path=MODEL, dtype="float32", resolution=64, text_length=13), CPU)


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_head_gives_what_the_whole_network_computes_on_its_way(generator, latents):
    conditions = Conditions({"tokens": torch.randn(2, 26, 192), "pooled": torch.randn(2, 256)})
    sigma, seen = torch.tensor([0.3, 0.8]), {}
    for number, block in enumerate(generator.transformer.transformer_blocks, start=1):
        block.register_forward_hook(lambda _, __, output, n=number: seen.__setitem__(n, output[1]))
    generator.velocity(latents, sigma, conditions)
    found = BackboneHead.of(generator).features(latents, sigma, conditions, range(7))
    assert torch.equal(found[0], latents)
    for number, tokens in seen.items():
        assert torch.equal(found[number].flatten(2).transpose(1, 2), tokens)


def test_blocks_after_the_last_asked_for_are_neither_run_nor_loaded(generator, latents):
    conditions = Conditions({"tokens": torch.randn(2, 26, 192), "pooled": torch.randn(2, 256)})
    head = load_backbone(MODEL, 2, torch.float32, CPU)
    assert len(head.network.transformer_blocks) == 2
    whole = BackboneHead.of(generator)
    ran = []
    hooks = [
        block.register_forward_hook(lambda *_, n=number: ran.append(n))
        for number, block in enumerate(generator.transformer.transformer_blocks, start=1)
    ]
    sigma = torch.tensor([0.5, 0.5])
    expected = whole.features(latents, sigma, conditions, [2])[2]
    for hook in hooks:
        hook.remove()
    assert ran == [1, 2]
    assert torch.equal(head.features(latents, sigma, conditions, [2])[2], expected)
    with pytest.raises(ValueError, match="from 0 to 2"):
        head.features(latents, sigma, conditions, [3])


@pytest.mark.parametrize("first", [1, 2, 5])
def test_a_tail_completes_the_tower_it_was_cut_from(first):
    clip, _ = load_clip("miniature/weights/clip", CPU)
    pixels = torch.randn(3, 3, 64, 64)
    given = vision_states(clip, pixels, 8)
    tail = RewardTail(clip, first).eval()
    if first == 1:
        states, embedding = tail(given[0].transpose(1, 2).unflatten(2, (8, 8)))
    else:
        # Beyond block 1 the class token is a constant; put the true one in, for one image
        tail.set_start(given[first - 1][0, 0], torch.zeros(64, 128))
        states, embedding = tail(given[first - 1][:1, 1:].transpose(1, 2).unflatten(2, (8, 8)))
    expected = clip.get_image_features(pixel_values=pixels).pooler_output[: len(states)]
    torch.testing.assert_close(states, given[8][: len(states)], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embedding, expected / expected.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_scores_are_one_float_a_sample_and_do_not_depend_on_company(aesthetic_folder, latents):
    model = StitchedValueModel.from_pretrained(aesthetic_folder)
    scores = model.score(latents, torch.tensor([0.3, 0.6]))
    assert scores.shape == (2,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores[:1], model.score(latents[:1], 0.3), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores, model.score(latents, 0.9))


@pytest.mark.parametrize("folder", ["aesthetic_folder", "clip_folder"])
def test_the_gradient_in_the_latent_agrees_with_finite_differences(folder, request, latents):
    model = StitchedValueModel.from_pretrained(request.getfixturevalue(folder))
    model.network.double()
    model.backbone.network.double()
    model.backbone.dtype = torch.float64
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).double()
    direction /= direction.norm()

    def value(z: torch.Tensor) -> torch.Tensor:
        return model.score(z, 0.5, PROMPTS).sum()

    z = latents.double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(z), z)
    step = 1e-2
    with torch.no_grad():
        measured = (value(z + step * direction) - value(z - step * direction)) / (2 * step)
    along = (gradient * direction).sum()
    assert float(gradient.norm()) > 0
    assert abs(float(measured - along)) <= 2e-3 * max(abs(float(along)), 0.1 * float(gradient.norm()))


def test_shared_heads_score_as_separate_ones_bit_for_bit(aesthetic_folder, clip_folder, latents):
    folders = {"aesthetic": str(aesthetic_folder), "clip": str(clip_folder)}
    models = load_value_models(folders, CPU)
    assert models["aesthetic"].backbone is models["clip"].backbone
    calls = []
    block = models["clip"].backbone.network.transformer_blocks[0]
    hook = block.register_forward_hook(lambda *_: calls.append(1))
    together = score_all(models, latents, 0.4, PROMPTS)
    hook.remove()
    assert len(calls) == 1
    for name, folder in folders.items():
        alone = StitchedValueModel.from_pretrained(folder).score(latents, 0.4, PROMPTS)
        assert torch.equal(alone, together[name])


def test_the_generators_own_blocks_serve_as_the_backbone(aesthetic_folder, generator, latents):
    shared = StitchedValueModel.from_pretrained(aesthetic_folder, backbone=BackboneHead.of(generator))
    assert shared.backbone.network is generator.transformer
    alone = StitchedValueModel.from_pretrained(aesthetic_folder)
    assert torch.equal(shared.score(latents, 0.4), alone.score(latents, 0.4))


def test_a_model_that_reads_text_needs_prompts(clip_folder, latents):
    model = StitchedValueModel.from_pretrained(clip_folder)
    with pytest.raises(InputError, match="needs the prompts"):
        model.score(latents, 0.4)
    assert not torch.equal(model.score(latents, 0.4, PROMPTS), model.score(latents, 0.4, PROMPTS[::-1]))


def test_misfits_are_refused_in_one_line(aesthetic_folder, generator, latents, tmp_path):
    model = StitchedValueModel.from_pretrained(aesthetic_folder)
    model.require_fit(generator)
    with pytest.raises(InputError, match=r"reads latents of \(batch, 16 x 8 x 8\), got \(2, 16, 4, 4\)"):
        model.score(latents[..., :4, :4], 0.5)
    larger = Generator(
        generator.family, generator.transformer, generator.vae, scheduler=generator.scheduler, resolution=128
    )
    with pytest.raises(InputError, match="for 64 px, the generator makes 128 px"):
        model.require_fit(larger)
    shutil.copytree(aesthetic_folder, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["vae"]["weights"][0] += 1
    config["backbone"]["signature"][0] += 1
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="another backbone"):
        StitchedValueModel.from_pretrained(tmp_path / "other")
    config["backbone"]["signature"][0] -= 1
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="another autoencoder"):
        StitchedValueModel.from_pretrained(tmp_path / "other").require_fit(generator)


def test_damaged_folders_are_named(aesthetic_folder, tmp_path):
    with pytest.raises(InputError, match=r"value model not found: .*launch/stitch\.py"):
        StitchedValueModel.from_pretrained(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is not a value model"):
        StitchedValueModel.from_pretrained(tmp_path / "empty")
    shutil.copytree(aesthetic_folder, tmp_path / "torn")
    tensors = load_file(tmp_path / "torn/model.safetensors")
    tensors.pop("network.stitch.linear.weight")
    save_file(tensors, tmp_path / "torn/model.safetensors")
    with pytest.raises(InputError, match="is damaged"):
        StitchedValueModel.from_pretrained(tmp_path / "torn")
