"""Second stage of CLIP and of the aesthetic head: the reward models, apart from the generator's text encoders.

Plain contrastive training hardly needs to look at what a generator gets wrong: among random scenes the colours
alone tell most captions apart. Here every scene stands beside itself with one fact altered and beside itself with
malformed shapes, and the true score of clean scenes weighs as much as that of strange ones.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from miniature import clip, scenes
from miniature.clip import Towers
from miniature.training import train

STEPS = 2650
PAIRS = 56  # scenes per step, each with its altered sibling
MALFORMED = 28
DISTORTED = 32


def warp(images: torch.Tensor, reach: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Bend (batch, 3, h, w) pictures by a smooth random field with a standard deviation of `reach` (batch,) pixels."""
    size = images.shape[-1]
    coarse = torch.randn(len(images), 2, 6, 6, generator=random)
    field = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    moved = grid + field.permute(0, 2, 3, 1) * (reach * 2 / size).view(-1, 1, 1, 1)
    return F.grid_sample(images, moved, mode="bilinear", padding_mode="border", align_corners=False)


def _uniform(count: int, low: float, high: float, random: torch.Generator) -> torch.Tensor:
    return torch.rand(count, generator=random) * (high - low) + low


def malform(chosen: list[scenes.Scene], rng: np.random.Generator, random: torch.Generator) -> torch.Tensor:
    """Pictures of scenes whose shapes are bent out of their kind, or blend with another kind."""
    images = scenes.render(chosen)
    others = []
    for scene in chosen:
        shapes = tuple((colour, scenes.KINDS[rng.integers(4)]) for colour, _ in scene.facts.shapes)
        facts = scenes.Facts(shapes, scene.facts.background, scene.facts.relation)
        others.append(scenes.Scene(facts, "", scene.shade, scene.centres, scene.radii, scene.vividness))
    blended = torch.lerp(images, scenes.render(others), _uniform(len(chosen), 0.35, 0.65, random).view(-1, 1, 1, 1))
    changed = (blended - images).abs().amax((1, 2, 3)) > 0.1
    blend = changed & (torch.rand(len(chosen), generator=random) < 0.2)
    bent = warp(images, _uniform(len(chosen), 3.0, 5.5, random), random)
    return torch.where(blend.view(-1, 1, 1, 1), blended, bent)


def soften(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """What a decoder does to a right picture: a slight bend, slight noise, and sometimes a slight blur."""
    images = warp(images, _uniform(len(images), 0.0, 0.6, random), random)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, _uniform(len(images), 0.0, 0.7, random).view(-1, 1, 1, 1))
    noise = torch.randn(images.shape, generator=random)
    return (images + noise * _uniform(len(images), 0.0, 0.025, random).view(-1, 1, 1, 1)).clamp(0, 1)


@torch.no_grad()
def decoded(images: torch.Tensor, vae: AutoencoderKL, random: torch.Generator) -> torch.Tensor:
    """Half of the pictures as the autoencoder gives them back from a slightly noisy latent: as generated ones look."""
    half = torch.rand(len(images), generator=random) < 0.5
    latents = vae.encode(images[half] * 2 - 1).latent_dist.mode()
    reach = _uniform(len(latents), 0.0, 0.15, random).view(-1, 1, 1, 1) / vae.config.scaling_factor
    latents = latents + reach * torch.randn(latents.shape, generator=random)
    images = images.clone()
    images[half] = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    return images


@torch.no_grad()
def told_apart(towers: Towers, count: int = 400) -> float:
    """Share of held-out scenes whose caption fits their own picture better than the sibling with one fact altered."""
    rng = np.random.default_rng(906)
    chosen = scenes.draw_scenes(count, 907, held_out=True)
    altered = [scenes.alter(scene, rng) for scene in chosen]
    texts = towers.embed_texts(clip.tokenize([scene.caption for scene in chosen]))[0]
    original, other = (towers.embed_images(scenes.render(drawn)) for drawn in (chosen, altered))
    return float(((texts * original).sum(-1) > (texts * other).sum(-1)).float().mean())


def quality(towers: Towers) -> dict[str, float]:
    """As `clip.quality`, and how well altered siblings are distinguished."""
    return clip.quality(towers) | {"siblings": told_apart(towers.eval())}


def pretrain(
    folder: Path,
    towers: Towers,
    vae: AutoencoderKL,
    drawn: list[scenes.Scene],
    pool: torch.Tensor,
    stop_at: int | None = None,
) -> Towers:
    """Train CLIP and the head on from the first stage's towers; resumable. Writes reward.safetensors."""
    towers.clip.requires_grad_(True)
    towers.head.requires_grad_(True)
    trained = torch.nn.ModuleList([towers.clip, towers.head])
    scale: torch.Tensor = towers.clip.logit_scale

    def step_loss(step: int, random: torch.Generator):
        rng = np.random.default_rng((2, step))
        chosen = [drawn[index] for index in torch.randint(len(drawn), (PAIRS,), generator=random)]
        pairs = chosen + [scenes.alter(scene, rng, held_out=False) for scene in chosen]
        right = soften(scenes.render(pairs), random)
        wrong = malform(chosen[:MALFORMED], rng, random)
        strange = pool[torch.randint(len(pool), (DISTORTED,), generator=random)].float() / 255
        images = torch.cat([decoded(torch.cat([right, wrong]), vae, random), clip.distort(strange, random)])
        truth = scenes.true_aesthetic(images)
        embedded = towers.embed_images(images)
        texts = towers.clip.get_text_features(clip.tokenize([scene.caption for scene in pairs])).pooler_output
        pictures = embedded[: len(right) + len(wrong)]
        matching = clip.contrast(pictures, F.normalize(texts.float(), dim=-1), clip.facts_of(pairs), scale)
        error = (towers.head(embedded)[:, 0] - truth).square()
        clean, other = error[: len(right)].mean(), error[len(right) :].mean()
        shown = {"match": matching.item(), "clean": clean.item(), "strange": other.item()}
        return matching + 16 * clean + 2 * other, shown

    optimizer = torch.optim.AdamW(trained.parameters(), lr=8e-4, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    train(
        "reward",
        trained,
        step_loss,
        [optimizer],
        STEPS,
        folder,
        warmup=50,
        average=0.99,
        every=lambda *_: quality(towers),
        evaluate_every=200,
        stop_at=stop_at,
    )
    clip.save_towers(towers, folder / "reward.safetensors")
    return towers.eval()
