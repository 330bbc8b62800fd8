"""Put the pretrained parts into the folders that real models come in, and measure them there."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel

from miniature import checker, clip, reward, scenes, vae, wording
from miniature.generator import Generator, decode, sample, verdict

WEIGHTS = Path(__file__).parent / "weights"


def load_vae(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)


def load_towers(folder: Path, name: str = "towers") -> clip.Towers:
    """The first stage's `towers`, whose text towers the generator reads, or the second stage's `reward`."""
    towers = clip.Towers()
    towers.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return towers.eval().requires_grad_(False)


def load_generator(folder: Path) -> Generator:
    generator = Generator()
    generator.transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    generator.t5 = T5EncoderModel.from_pretrained(folder / "t5")
    return generator.eval().requires_grad_(False)


def assemble(folder: Path, weights: Path) -> None:
    """Write weights/sd3 (a StableDiffusion3Pipeline), weights/clip (CLIPModel) and weights/aesthetic."""
    towers, judge, generator = load_towers(folder), load_towers(folder, "reward"), load_generator(folder)
    text_config = CLIPTextConfig(**towers.clip.config.text_config.to_dict() | {"projection_dim": clip.PROJECTION})
    first = CLIPTextModelWithProjection(text_config)
    first.text_model.load_state_dict(towers.clip.text_model.state_dict())
    first.text_projection.load_state_dict(towers.clip.text_projection.state_dict())
    pipeline = StableDiffusion3Pipeline(
        transformer=generator.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=load_vae(folder),
        text_encoder=first,
        tokenizer=wording.clip_tokenizer(),
        text_encoder_2=towers.second,
        tokenizer_2=wording.clip_tokenizer(pad_token="!"),
        text_encoder_3=generator.t5,
        tokenizer_3=wording.t5_tokenizer(),
    )
    pipeline.to(torch.float16).save_pretrained(weights / "sd3")
    judge.clip.half().save_pretrained(weights / "clip")
    wording.clip_tokenizer().save_pretrained(weights / "clip")
    side = {"height": scenes.SIZE, "width": scenes.SIZE}
    CLIPImageProcessor(size={"shortest_edge": scenes.SIZE}, crop_size=side).save_pretrained(weights / "clip")
    (weights / "aesthetic").mkdir(parents=True, exist_ok=True)
    clip.save_head(judge.head, weights / "aesthetic" / "model.safetensors")


def grid(images: torch.Tensor, columns: int, path: Path) -> None:
    """Save (count, 3, h, w) images in [0, 1] as one PNG, two screen pixels a pixel."""
    rows = images.split(columns)
    joined = torch.cat([torch.cat(list(row), dim=2) for row in rows if len(row) == columns], dim=1)
    picture = Image.fromarray((joined * 255).round().byte().permute(1, 2, 0).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def measure(folder: Path) -> None:
    """Assemble the weights, then measure them as loaded: the quality table (JSON) and a grid of samples."""
    assemble(folder, WEIGHTS)
    towers, judge = load_towers(folder), load_towers(folder, "reward")
    generator, autoencoder = load_generator(folder), load_vae(folder)
    result = {"vae": vae.quality(autoencoder, scenes.draw_scenes(500, 911, True)), "clip": reward.quality(judge)}
    result["clip"].pop("recall_second")  # the second text tower is the generator's alone
    chosen = scenes.draw_scenes(400, 912, held_out=True, shares=(0.5, 0.5, 0.0))
    captions = [scene.caption for scene in chosen]
    images = decode(autoencoder, sample(generator, captions, towers, steps=25, seed=913))
    strict = checker.check_captions(captions, images)[0]
    embedded, texts = judge.embed_images(images), judge.embed_texts(clip.tokenize(captions))[0]
    truth, head, similarity = scenes.true_aesthetic(images), judge.head(embedded)[:, 0], (embedded * texts).sum(-1)
    right, wrong = similarity[strict == 1], similarity[strict == 0]
    result["generator"] = verdict(chosen, images) | {
        "spearman_head": clip.spearman(head, truth),
        "clip_prefers_right": float((right[:, None] > wrong[None, :]).float().mean()),
    }
    grid(images[:64], 8, WEIGHTS.parent / "samples.png")
    (WEIGHTS.parent / "quality.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
