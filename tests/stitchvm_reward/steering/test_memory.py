"""The memory of a steered step is planned, and the micro batch follows from it."""

import pytest
import torch
from torch import nn

from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import SD3
from stitchvm_reward.measure import peak_mib
from stitchvm_reward.steering.build import encode, steer
from stitchvm_reward.steering.memory import encoders_away, fit_micro_batch, planned_micro_batch, step_bytes
from stitchvm_reward.steering.sampling import as_value, make_denoiser
from stitchvm_reward.steering.settings import Settings
from stitchvm_reward.stitching.value_model import StitchedValueModel
from tests.stitchvm_reward.steering.conftest import VALUE

CPU, MIB = torch.device("cpu"), 2**20
SETTINGS = Settings(steps=6, guidance=2.0)


@pytest.fixture
def denoiser(pipeline, reward):
    conditions, negative = encode(pipeline, ["a red cross"], "", 16)
    generator = Generator.of_pipeline(pipeline, 64, 2.0)
    return make_denoiser(
        generator,
        ["a red cross"],
        conditions,
        negative,
        value=as_value(reward),
        settings=Settings(steps=6, guidance=2.0),
    )


def test_the_plan_of_a_guided_step_is_what_the_step_creates(denoiser, reward):
    value = as_value(reward)
    latents = torch.randn(1, *denoiser.generator.latent_shape)
    found = peak_mib(lambda: value.gradient(denoiser, latents, 3), CPU)
    assert step_bytes(denoiser, "dps", value, 1, 3) / MIB == pytest.approx(found, rel=0.02) and found > 10


def test_the_micro_batch_is_the_largest_power_of_two_that_fits(denoiser, reward, monkeypatch):
    monkeypatch.setattr("stitchvm_reward.steering.memory.step_bytes", lambda *_: 1000)

    def planned(free, method="dps", kept=0):
        return planned_micro_batch(denoiser, method, as_value(reward), SETTINGS, kept=kept, free=free)

    assert planned(7900) == 4 and planned(8000) == 8 and planned(1e15) == 16
    with pytest.raises(InputError, match=r"one latent of dps needs .* GiB beside the networks"):
        planned(900)
    assert planned(8000, "fk", kept=500) == 4  # four particles keep as much as two latents' steps
    assert fit_micro_batch(denoiser, "dps", as_value(reward), Settings(micro_batch=3), 0) is denoiser


@pytest.mark.slow
def test_a_user_s_own_code_is_not_run_to_plan(denoiser):
    class Mine:
        def score(self, images, prompts):
            raise AssertionError("called")

    assert planned_micro_batch(denoiser, "fk", as_value(Mine()), SETTINGS, kept=0, free=1e15) == 16


def test_an_open_micro_batch_samples_the_same_pictures(pipeline, reward):
    given, opened = (
        steer(pipeline, ["a red cross"], "best_of_n", reward, Settings(steps=3, guidance=1.0, micro_batch=size)).images
        for size in (2, None)
    )
    torch.testing.assert_close(given, opened, atol=1e-3, rtol=0)


class Encoder(nn.Linear):
    """A text encoder that says it is on a GPU, and keeps where it was sent."""

    def __init__(self):
        super().__init__(2, 2)
        self.sent: list[str] = []

    device = property(lambda self: torch.device(self.sent[-1] if self.sent else "cuda:0"))

    def to(self, device):
        self.sent.append(str(device))
        return self


def test_text_encoders_leave_the_gpu_while_it_steers_and_return(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))

    class Pipeline:
        text_encoder, text_encoder_2, text_encoder_3 = Encoder(), Encoder(), None
        tokenizer = tokenizer_2 = tokenizer_3 = None

    Pipeline.text_encoder_2._hf_hook = object()  # diffusers places this one itself
    with pytest.raises(KeyError), encoders_away(SD3, Pipeline, torch.device("cuda:0")):
        assert Pipeline.text_encoder.sent == ["cpu"] and emptied
        raise KeyError  # whatever happens
    assert Pipeline.text_encoder.sent == ["cpu", "cuda:0"] and not Pipeline.text_encoder_2.sent


def test_a_value_model_follows_the_latents_device_or_says_where_it_is():
    model = StitchedValueModel.from_pretrained(VALUE)
    with pytest.raises(InputError, match=r"value model is on the cpu device, the latents are on meta"):
        model.score(torch.zeros(1, *model.latent_shape, device="meta"), 0.5)
    moved = model.to("meta")
    assert moved.device.type == "meta"
    assert moved.score(torch.zeros(1, *model.latent_shape, device="meta"), 0.5).device.type == "meta"
