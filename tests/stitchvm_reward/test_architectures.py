"""Published shapes of the reward towers, on the meta device."""

import json
import shutil

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from stitchvm_reward.errors import InputError
from stitchvm_reward.families import architecture_of
from stitchvm_reward.rewards.architectures import CLIPS, clip_configuration
from stitchvm_reward.stitching.config import load_stitch_recipe

# Parameters, blocks, patches a side, activation.
PUBLISHED = {
    "openai/clip-vit-large-patch14": (427_616_513, 24, 16, "quick_gelu"),
    "openai/clip-vit-large-patch14-336": (427_944_193, 24, 24, "quick_gelu"),
    "apple/DFN5B-CLIP-ViT-H-14-378": (986_714_881, 32, 27, "quick_gelu"),
    "adams-story/HPSv2-hf": (986_109_441, 32, 16, "gelu"),
    "yuvalkirstain/PickScore_v1": (986_109_441, 32, 16, "gelu"),
}


def by_hand(vision: dict, text: dict, projection: int) -> int:
    """Parameters of both towers: blocks of attention (4 matrices), two norms and two layers, and what is around."""

    def blocks(tower: dict) -> int:
        width, inner = tower["hidden_size"], tower["intermediate_size"]
        block = 4 * (width * width + width) + 4 * width + 2 * width * inner + width + inner
        return tower["num_hidden_layers"] * block

    wide, side = vision["hidden_size"], vision["patch_size"]
    positions = (vision["image_size"] // side) ** 2 + 1
    seen = wide * (1 + positions + 3 * side * side + 4 + projection) + blocks(vision)
    read = text["hidden_size"] * (49_408 + 77 + 2 + projection) + blocks(text)
    return seen + read + 1


def test_every_published_tower_is_known():
    assert CLIPS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_reward_tower_has_its_published_size(model):
    parameters, blocks, patches, activation = PUBLISHED[model]
    config = clip_configuration(model)
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(**config))
    assert sum(parameter.numel() for parameter in clip.parameters()) == parameters
    assert by_hand(config["vision_config"], config["text_config"], config["projection_dim"]) == parameters
    vision = clip.config.vision_config
    assert vision.num_hidden_layers == blocks and vision.image_size == patches * vision.patch_size
    assert vision.hidden_act == clip.config.text_config.hidden_act == activation
    assert (clip.config.text_config.vocab_size, clip.config.text_config.max_position_embeddings) == (49_408, 77)


@pytest.mark.parametrize("name", ["aesthetic", "clip", "dfn", "hpsv2", "pickscore"])
def test_shipped_recipes_name_a_tower_that_is_known_here(name):
    assert load_stitch_recipe(f"recipes/stitch/sd35m_{name}.yaml").reward.model in CLIPS


def test_a_folders_own_configuration_is_read(tmp_path):
    found = clip_configuration("miniature/weights/clip")
    assert found["projection_dim"] == 128 and found["text_config"]["vocab_size"] == 203
    for content in ("{}", "not json", json.dumps({"vision_config": {}, "projection_dim": 8}), "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match="is not a CLIP model folder"):
            clip_configuration(str(tmp_path))
    with pytest.raises(InputError, match="the shapes of somebody/clip are not known"):
        clip_configuration("somebody/clip")


def test_a_folder_that_lacks_a_part_is_told(tmp_path):
    shutil.copytree("miniature/weights/sd3", tmp_path / "sd3", ignore=shutil.ignore_patterns("*.safetensors"))
    first, second, third = architecture_of(str(tmp_path / "sd3")).text_encoders
    assert first["projection_dim"] + second["projection_dim"] == 256 and third["d_model"] == 192
    for part in ("text_encoder_3", "vae"):
        config = tmp_path / "sd3" / part / "config.json"
        whole = config.read_text()
        for spoil in (lambda config: config.write_text("{"), lambda config: config.unlink()):
            spoil(config)
            with pytest.raises(InputError, match="is not a complete Stable Diffusion 3 pipeline folder"):
                architecture_of(str(tmp_path / "sd3"))
        config.write_text(whole)
