"""The bundled miniature, to be steered."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.generator import load_vae
from stitchvm_reward.families import SD3
from stitchvm_reward.rewards.aesthetic import AestheticReward
from stitchvm_reward.stitching.value_model import StitchedValueModel

MODEL, VALUE = "miniature/weights/sd3", "miniature/weights/value/aesthetic"
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def make_pipeline():
    def make() -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline.from_pretrained(MODEL, vae=load_vae(MODEL, CPU), dtype=torch.float32)

    return make


@pytest.fixture(scope="session")
def pipeline(make_pipeline):
    return make_pipeline()


@pytest.fixture(scope="session")
def value(pipeline):
    """The bundled value model on the pipeline's own blocks."""
    return StitchedValueModel.from_pretrained(VALUE, "cpu", BackboneHead(SD3, pipeline.transformer))


@pytest.fixture(scope="session")
def reward():
    return AestheticReward("miniature/weights/clip", "miniature/weights/aesthetic", CPU)


@pytest.fixture(scope="session")
def other_pipeline(make_pipeline):
    """Another generator of another size, with the same autoencoder and text encoders; its weights are drawn."""
    made = make_pipeline()
    torch.manual_seed(0)
    made.transformer = SD3Transformer2DModel.from_config(
        dict(made.transformer.config) | {"num_layers": 3, "dual_attention_layers": (0,)}
    ).eval()
    return made
