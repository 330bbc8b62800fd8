"""A second, smaller generator for the first one's autoencoder and text encoders: pruned, then distilled.

It stands to the first as Stable Diffusion 3.5 Medium stands to Large: another network over the same latents.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from miniature import scenes, wording
from miniature.assemble import WEIGHTS
from miniature.generator import draw_noised, encode_pool, verdict
from miniature.training import train

FIRST, SMALLER = WEIGHTS / "sd3", WEIGHTS / "sd3_small"
KEPT = (0, 2, 4, 5)  # of the ways to leave out two blocks, the one that changed the velocity least
STEPS = 750
BATCH = 64


def prune(teacher: SD3Transformer2DModel, kept: tuple[int, ...] = KEPT) -> SD3Transformer2DModel:
    """A trainable copy of `teacher` that has only its blocks `kept`, in that order; the last must be the last one's.

    Its configuration names the dual attention layers by their new numbers. Raises RuntimeError, from the copying of
    the weights, where the last block is another: Stable Diffusion 3 builds that one without an output for the text.
    """
    dual = tuple(number for number, block in enumerate(kept) if block in teacher.config.dual_attention_layers)
    # Without the folder of the teacher, which would be saved as the origin of this network.
    config = {name: value for name, value in teacher.config.items() if name != "_name_or_path"}
    smaller = SD3Transformer2DModel.from_config(config, num_layers=len(kept), dual_attention_layers=dual)
    for name, part in smaller.named_children():
        if name != "transformer_blocks":
            part.load_state_dict(getattr(teacher, name).state_dict())
    for block, number in zip(smaller.transformer_blocks, kept, strict=True):
        block.load_state_dict(teacher.transformer_blocks[number].state_dict())
    return smaller.train()


@torch.no_grad()
def embed(pipeline: StableDiffusion3Pipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (count, 2 * LENGTH, width) and pooled embeddings (count, width) in half precision, as the pipeline's."""
    tokens, pooled = [], []
    for first in range(0, len(captions), 500):
        result = pipeline.encode_prompt(
            captions[first : first + 500],
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=wording.LENGTH,
        )
        tokens.append(result[0].half())
        pooled.append(result[2].half())
    return torch.cat(tokens), torch.cat(pooled)


def pretrain(folder: Path, drawn: list[scenes.Scene], pool: torch.Tensor, stop_at: int | None = None) -> None:
    """Teach the pruned network the first one's velocity on the pool's noised latents; resumable from `folder`.

    Reads weights/sd3 and writes weights/sd3_small/transformer in half precision.
    """
    torch.manual_seed(0)
    pipeline = StableDiffusion3Pipeline.from_pretrained(FIRST, dtype=torch.float32)
    teacher = pipeline.transformer.eval().requires_grad_(False)
    latents = encode_pool(pipeline.vae, pool, folder / "latents.safetensors")
    captions = list(dict.fromkeys(["", *(scene.caption for scene in drawn)]))
    tokens, pooled = embed(pipeline, captions)
    known = {caption: number for number, caption in enumerate(captions)}
    numbers = torch.tensor([known[scene.caption] for scene in drawn])
    smaller = prune(teacher)

    def step_loss(step: int, random: torch.Generator):
        _, _, sigma, noised, caption = draw_noised(latents, numbers, BATCH, random)
        inputs = (noised, tokens[caption].float(), pooled[caption].float(), sigma * 1000)
        with torch.no_grad():
            target = teacher(*inputs, return_dict=False)[0]
        return F.mse_loss(smaller(*inputs, return_dict=False)[0], target), {}

    optimizer = torch.optim.AdamW(smaller.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    train("smaller", smaller, step_loss, [optimizer], STEPS, folder, warmup=20, average=0.99, stop_at=stop_at)
    smaller.half().save_pretrained(SMALLER / "transformer")


@torch.no_grad()
def quality(folder: Path, count: int = 200, steps: int = 25) -> dict[str, float]:
    """Checker results and true aesthetic of a pipeline folder on held-out captions of one and two shapes.

    Plain Euler steps without guidance, in float32, from the same noise for every folder.
    """
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    chosen = scenes.draw_scenes(count, 914, held_out=True, shares=(0.5, 0.5, 0.0))
    captions = [scene.caption for scene in chosen]
    images = pipeline(
        captions,
        height=scenes.SIZE,
        width=scenes.SIZE,
        num_inference_steps=steps,
        guidance_scale=1.0,
        max_sequence_length=wording.LENGTH,
        generator=torch.Generator().manual_seed(915),
        output_type="pt",
    ).images
    return verdict(chosen, images)


def measure() -> None:
    """Put the quality of both pipeline folders, on the same captions and noise, under "smaller" in the table."""
    path = WEIGHTS.parent / "quality.json"
    result = json.loads(path.read_text())
    result["smaller"] = {folder.name: quality(folder) for folder in (FIRST, SMALLER)}
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["smaller"], indent=2))
