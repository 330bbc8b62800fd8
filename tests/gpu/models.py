"""Step `model`: a pipeline of random weights at real shapes on the local disk, its reward, prompts and images."""

import shutil

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from miniature import wording
from miniature.images import write
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.families import architecture_of
from stitchvm_reward.rewards import load_reward
from stitchvm_reward.rewards.aesthetic import AestheticHead
from stitchvm_reward.rewards.architectures import clip_configuration
from stitchvm_reward.rewards.recipe import RewardRecipe
from tests.gpu.setting import Findings, Setting
from tests.tiny import ROOT

CLIP = "openai/clip-vit-large-patch14"
IMAGES = {True: 96, False: 72}


def _write_pipeline(setting: Setting) -> None:
    """Write the pipeline. Its text encoders have the real widths, one layer, and the vocabulary of the miniature."""
    architecture = architecture_of(setting.shapes)
    family, dtype = architecture.family, torch.bfloat16 if setting.cuda else torch.float32
    clips = wording.clip_tokenizer(), wording.clip_tokenizer(pad_token="!")
    t5 = wording.t5_tokenizer()
    for tokenizer in clips:
        tokenizer.model_max_length = architecture.clip_tokens
    if setting.cuda:
        t5.model_max_length = family.text_length
    first, second, third = architecture.text_encoders
    words = {"num_hidden_layers": 1, "max_position_embeddings": architecture.clip_tokens}

    def clip(config, tokenizer):
        marks = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        return CLIPTextModelWithProjection(CLIPTextConfig(**(dict(config) | words | marks))).to(dtype)

    torch.manual_seed(0)
    length = {"num_layers": 1, "vocab_size": len(t5)}
    with torch.device(setting.device):
        pipeline = family.pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(dict(architecture.scheduler)),
            vae=family.autoencoder.from_config(dict(architecture.vae)),
            transformer=family.transformer.from_config(dict(architecture.transformer)).to(dtype),
            text_encoder=clip(first, clips[0]),
            text_encoder_2=clip(second, clips[1]),
            text_encoder_3=T5EncoderModel(T5Config(**(dict(third) | length))).to(dtype),
            tokenizer=clips[0],
            tokenizer_2=clips[1],
            tokenizer_3=t5,
        )
    pipeline.save_pretrained(setting.model)


def _write_reward(setting: Setting) -> None:
    torch.manual_seed(1)
    configuration = clip_configuration(CLIP)
    CLIPModel(CLIPConfig(**configuration)).save_pretrained(setting.clip)
    head = AestheticHead(configuration["projection_dim"])
    setting.head.mkdir(parents=True, exist_ok=True)
    save_file(head.state_dict(), setting.head / "model.safetensors")


def model(setting: Setting) -> Findings:
    """Write everything that later steps read, and load it as they do."""
    found = Findings()
    shutil.rmtree(setting.model, ignore_errors=True)
    _write_pipeline(setting)
    if setting.cuda:
        _write_reward(setting)
    for name, count in (("train", 24), ("held_out", 16)):
        lines = (ROOT / f"miniature/prompts/{name}.txt").read_text().splitlines()[:count]
        (setting.work / f"{name}.txt").write_text("\n".join(lines) + "\n")
    write(IMAGES[setting.cuda], setting.images)
    dtype, side = ("bfloat16", 512) if setting.cuda else ("float32", 64)
    generator = Generator.load(ModelRecipe(path=str(setting.model), dtype=dtype, resolution=side), setting.device)
    with torch.device("meta"):
        expected = generator.family.transformer.from_config(dict(architecture_of(setting.shapes).transformer))
    count, wanted = (sum(p.numel() for p in m.parameters()) for m in (generator.transformer, expected))
    found.check("the loaded transformer has the parameters of the model it stands for", count == wanted, count)
    reward = load_reward(
        RewardRecipe(kind="aesthetic", model=str(setting.clip), head=str(setting.head)), setting.device
    )
    scores = reward.score(torch.rand(2, 3, side, side, device=setting.device), ["", ""])
    found.check("the reward scores images", bool(scores.isfinite().all()))
    return found
