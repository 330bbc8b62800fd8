"""Every family computes what its diffusers pipeline computes, whole and in parts."""

import json

import pytest
import torch
from safetensors.torch import load_file

from miniature import wording
from stitchvm_reward.diffusion.backbone import BackboneHead, load_backbone
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.prompt_cache import PromptCache, bytes_per_prompt, load_text_pipeline
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.diffusion.solvers import solve
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import FLUX, SD3, architecture_of, family_of
from stitchvm_reward.families.family import PipelineSettings
from stitchvm_reward.families.flux import pack, unpack
from tests.tiny_models import RESOLUTION, tiny_flux, tiny_sd3

CPU = torch.device("cpu")
PROMPTS = ["a red circle on white", "two blue squares, black background"]
GUIDANCE = {"sd3": 1.0, "flux": 3.5}


@pytest.fixture(scope="module", params=["sd3", "flux"])
def folder(request, tmp_path_factory):
    make = {"sd3": tiny_sd3, "flux": tiny_flux}[request.param]
    return make(tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture(scope="module")
def recipe(folder):
    return ModelRecipe(str(folder), "float32", RESOLUTION, wording.LENGTH)


@pytest.fixture(scope="module")
def pipeline(folder):
    loaded = family_of(str(folder)).pipeline.from_pretrained(folder, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def generator(recipe):
    return Generator.load(recipe, CPU)


@pytest.fixture(scope="module")
def conditions(recipe, tmp_path_factory):
    cache = PromptCache(recipe, str(tmp_path_factory.mktemp("cache")), CPU)
    assert cache.ensure(PROMPTS) == len(PROMPTS) and cache.ensure(PROMPTS) == 0
    return cache.conditions(PROMPTS)


def noise(generator, count: int = len(PROMPTS)) -> torch.Tensor:
    return torch.randn(count, *generator.latent_shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_prompt_tensors_equal_those_of_the_pipeline(pipeline, conditions):
    if isinstance(pipeline, FLUX.pipeline):
        tokens, pooled, ids = pipeline.encode_prompt(PROMPTS, max_sequence_length=wording.LENGTH)
        assert not ids.any()
    else:
        tokens, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=wording.LENGTH
        )
    torch.testing.assert_close(conditions["tokens"], tokens, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(conditions["pooled"], pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", ["stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev"])
def test_what_is_kept_of_a_prompt_restores_all_of_it_and_takes_no_padding_of_the_width(model):
    architecture = architecture_of(model)
    family, length = architecture.family, architecture.family.text_length
    whole = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
        for name, tensor in family.stand_in(architecture, 2, length).tensors.items()
    }
    if family is SD3:
        whole["tokens"][:, :77, 768 + 1280 :] = 0  # CLIP's two widths; the rest is T5's
    kept = family.kept(architecture, whole)
    restored = family.restored(kept)
    assert restored.keys() == whole.keys() and all(torch.equal(restored[name], whole[name]) for name in whole)
    stored = sum(tensor[0].numel() * tensor.itemsize for tensor in kept.values())
    expected = 2 * ((77 * 2048 + 256 * 4096 + 2048) if family is SD3 else (512 * 4096 + 768))
    assert stored == expected == bytes_per_prompt(ModelRecipe(model, "bfloat16", 512, length))


def test_tensors_on_disk_are_those_that_the_plan_counts_and_do_not_depend_on_the_texts_beside_them(recipe, tmp_path):
    first, second = (PromptCache(recipe, str(tmp_path / name), CPU) for name in "ab")
    texts = [f"{prompt} {n}" for n in range(9) for prompt in PROMPTS]
    assert first.ensure(texts) == len(texts)
    assert second.ensure(texts[-1:]) == 1 and second.ensure(texts[::-1]) == len(texts) - 1
    for text in texts:
        assert first.path(text).read_bytes() == second.path(text).read_bytes()
        kept = load_file(first.path(text))
        assert sum(tensor.numel() * tensor.itemsize for tensor in kept.values()) == bytes_per_prompt(recipe)


def test_prompts_of_a_model_in_half_precision_are_stored_in_it(folder, tmp_path):
    cache = PromptCache(ModelRecipe(str(folder), "bfloat16", RESOLUTION, wording.LENGTH), str(tmp_path), CPU)
    cache.ensure(PROMPTS)
    assert {tensor.dtype for tensor in load_file(cache.path(PROMPTS[0])).values()} == {torch.bfloat16}


@torch.no_grad()
def test_a_sample_of_four_steps_and_its_picture_equal_those_of_the_pipeline(pipeline, generator, conditions):
    start = noise(generator)
    name = "flux" if generator.family is FLUX else "sd3"
    settings = PipelineSettings(4, GUIDANCE[name], RESOLUTION, wording.LENGTH)
    expected = generator.family.sample(pipeline, PROMPTS, start, settings)

    def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
        return generator.velocity(latents, torch.full((len(latents),), sigma), conditions)

    latents = solve(velocity, start, generator.sigmas(4))
    assert latents.std() > 0.1
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    packed = pack(start) if generator.family is FLUX else start
    shown = pipeline(PROMPTS, latents=packed, **settings.arguments() | {"output_type": "pt"}).images
    torch.testing.assert_close(generator.decode(latents), shown, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_pass_that_is_run_to_any_block_and_finished_is_the_whole_pass_bit_for_bit(generator, conditions):
    latents, sigma = noise(generator), torch.tensor([0.3, 0.9])
    whole = generator.velocity(latents, sigma, conditions)
    head = BackboneHead.of(generator)
    for block in range(1, head.blocks + 1):
        features, state = head.run(latents, sigma, conditions, [block])
        assert torch.equal(state.finish(), whole), f"block {block}"
        assert torch.equal(features[block], state.features()) and features[block].shape[2:] == (2, 2)
    _, state = head.run(latents, sigma, conditions, [2])
    row = torch.tensor([1, 0, 1])
    torch.testing.assert_close(state.select(row).finish(), whole[row], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_first_blocks_alone_give_the_same_features_and_no_other_weights_are_read(folder, generator, conditions):
    latents, sigma = noise(generator), torch.tensor([0.3, 0.9])
    depth = len(generator.blocks)
    for blocks in (1, depth - 1):
        head = load_backbone(str(folder), blocks, torch.float32, CPU)
        assert len(head.family.blocks(head.network)) == blocks
        expected = BackboneHead.of(generator).features(latents, sigma, conditions, [blocks])[blocks]
        assert torch.equal(head.features(latents, sigma, conditions, [blocks])[blocks], expected)
        assert head.signature(blocks) == BackboneHead.of(generator).signature(blocks)
    with pytest.raises(InputError, match=f"{depth} blocks, {depth + 1} were requested"):
        load_backbone(str(folder), depth + 1, torch.float32, CPU)


def test_shapes_that_are_known_without_weights_are_those_of_the_loaded_model(recipe, generator, conditions):
    architecture = architecture_of(recipe.path)
    assert architecture.latent_shape(RESOLUTION) == generator.latent_shape
    stand_in = architecture.family.stand_in(architecture, len(PROMPTS), recipe.text_length)
    assert stand_in.key() == conditions.key()
    tokens, width = architecture.family.sequence(architecture, RESOLUTION, recipe.text_length)
    state = generator.family.embed(
        generator.transformer, noise(generator), torch.tensor([0.3, 0.9]), conditions, generator.guidance
    )
    assert (state.text.shape[1] + state.image.shape[1], state.image.shape[2]) == (tokens, width)


def test_the_schedule_is_that_of_the_pipeline(pipeline, generator):
    for steps in (4, 10, 25):
        if generator.family is FLUX:
            from diffusers.pipelines.flux.pipeline_flux import calculate_shift

            levels = [1 - n * (1 - 1 / steps) / (steps - 1) for n in range(steps)]
            pipeline.scheduler.set_timesteps(sigmas=levels, mu=calculate_shift(4))
        else:
            pipeline.scheduler.set_timesteps(steps)
        torch.testing.assert_close(
            torch.tensor(generator.sigmas(steps)), pipeline.scheduler.sigmas.float(), rtol=1e-5, atol=1e-6
        )


@torch.no_grad()
def test_encoding_undoes_the_scaling_of_decoding(generator):
    images = torch.rand(1, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(3))
    raw = generator.vae.encode(images * 2 - 1).latent_dist.mode()
    config = generator.vae.config
    expected = (raw - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(generator.encode(images), expected)


def test_text_modules_are_the_text_encoders_of_the_pipeline(folder, pipeline):
    architecture = architecture_of(str(folder))
    with torch.device("meta"):
        modules = architecture.family.text_modules(architecture, wording.LENGTH)
    loaded = [getattr(pipeline, part) for part in architecture.family.text_parts if part.startswith("text_encoder")]
    for (module, length), theirs in zip(modules, loaded, strict=True):
        assert {n: p.shape for n, p in module.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
        assert length == wording.LENGTH


def test_text_encoders_load_without_transformer_and_autoencoder(folder):
    loaded = load_text_pipeline(family_of(str(folder)), folder, torch.float32, CPU)
    assert loaded.transformer is None and loaded.vae is None


def test_the_embedded_guidance_reaches_the_network(recipe, generator, conditions):
    latents, sigma = noise(generator), torch.tensor([0.3, 0.9])
    if generator.guidance is None:
        with pytest.raises(InputError, match=r"model\.guidance is 2, but .* reads no guidance scale"):
            Generator.load(ModelRecipe(recipe.path, "float32", RESOLUTION, wording.LENGTH, 2.0), CPU)
        return
    assert generator.guidance == 3.5
    other = Generator.load(ModelRecipe(recipe.path, "float32", RESOLUTION, wording.LENGTH, 2.0), CPU)
    with torch.no_grad():
        first, second = (g.velocity(latents, sigma, conditions) for g in (generator, other))
    assert (first - second).abs().max() > 1e-4


def test_packing_orders_patches_as_the_pipeline_does():
    latents = torch.arange(2 * 16 * 4 * 6, dtype=torch.float32).view(2, 16, 4, 6)
    expected = FLUX.pipeline._pack_latents(latents, 2, 16, 4, 6)
    assert torch.equal(pack(latents), expected) and torch.equal(unpack(pack(latents), (2, 3)), latents)


@pytest.mark.parametrize(
    ("model", "family", "parameters", "layers", "adapters"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", SD3, 2_243_171_520, 191, 18_776_064),
        ("stabilityai/stable-diffusion-3.5-large", SD3, 8_056_627_520, 303, None),
        ("black-forest-labs/FLUX.1-dev", FLUX, 11_901_408_320, 266, None),
    ],
)
def test_published_shapes_have_the_published_numbers_of_parameters(model, family, parameters, layers, adapters):
    architecture = architecture_of(model)
    assert architecture.family is family is family_of(model)
    with torch.device("meta"):
        network = family.transformer.from_config(architecture.transformer)
        text = family.text_modules(architecture, family.text_length)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sum(p.numel() for module, _ in text for p in module.parameters()) == architecture.text_parameters
    named = [
        layer
        for name, layer in network.named_modules()
        if isinstance(layer, torch.nn.Linear) and any(name.endswith(f".{target}") for target in family.lora_targets)
    ]
    assert len(named) == layers
    if adapters is not None:
        assert sum(32 * (layer.in_features + layer.out_features) for layer in named) == adapters
    assert family.published_as(network.config) == model


def test_a_folder_of_another_family_is_refused_with_the_supported_ones(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    with pytest.raises(
        InputError, match=r"PixArtSigmaPipeline; supported are Stable Diffusion 3 and 3\.5, and FLUX\.1"
    ):
        family_of(str(tmp_path))
    with pytest.raises(InputError, match=r"model_index\.json is missing or damaged"):
        family_of(str(tmp_path / ".."))
