"""Pretraining of the miniature's AutoencoderKL: 64x64x3 pixels to 8x8x16 latents."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from miniature import checker, scenes
from miniature.training import train

STEPS = 1450
BATCH = 24
KL_WEIGHT = 1e-4  # on the mean over latent elements, beside a weighted mean squared error over pixels
SHAPE_WEIGHT = 7.0  # pixels of shapes and their outlines against plain background


def build() -> AutoencoderKL:
    """The untrained autoencoder. Four channels or more a group: fewer lose a flat picture's amplitude."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=scenes.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def loss(vae: AutoencoderKL, images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
    """Weighted squared error, absolute error and KL on images (batch, 3, 64, 64) in [-1, 1]."""
    posterior = vae.encode(images).latent_dist
    restored = vae.decode(posterior.sample(generator=generator)).sample
    difference = (images - scenes.border_colour(images)).abs().amax(1, keepdim=True)
    near = F.max_pool2d((difference > 0.1).float(), 3, 1, 1)
    weight = 1 + (SHAPE_WEIGHT - 1) * near
    error = restored - images
    squared = (weight * error.square()).sum() / (3 * weight.sum())
    absolute = (weight * error.abs()).sum() / (3 * weight.sum())
    divergence = posterior.kl().mean() / posterior.mean[0].numel()
    shown = {"psnr": float(10 * torch.log10(4 / error.square().mean())), "kl": float(divergence)}
    return squared + 0.1 * absolute + KL_WEIGHT * divergence, shown


@torch.no_grad()
def quality(vae: AutoencoderKL, held_out: list[scenes.Scene], batch: int = 50) -> dict[str, float]:
    """PSNR in dB and strict checker accuracy of reconstructions of held-out scenes, and the latents' spread."""
    images = scenes.render(held_out)
    latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.mode() for part in images.split(batch)])
    restored = torch.cat([vae.decode(part).sample for part in latents.split(batch)]) / 2 + 0.5
    restored = restored.clamp(0, 1)
    psnr = -10 * torch.log10((restored - images).square().mean((1, 2, 3))).mean()
    strict, _ = checker.check_captions([scene.caption for scene in held_out], restored)
    return {
        "psnr": float(psnr),
        "checker": float(strict.mean()),
        "latent_std": float(latents.std()),
        "latent_mean": float(latents.mean()),
    }


def pretrain(folder: Path, pool: torch.Tensor, stop_at: int | None = None) -> AutoencoderKL:
    """Train on a pool of uint8 images; resumable. Writes the measured scaling and shift into the config."""
    torch.manual_seed(0)
    vae = build().to(memory_format=torch.channels_last)
    held_out = scenes.draw_scenes(300, seed=901, held_out=True)

    def step_loss(step: int, generator: torch.Generator):
        chosen = torch.randint(len(pool), (BATCH,), generator=generator)
        images = (pool[chosen].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        return loss(vae, images, generator)

    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-3, fused=True)
    train(
        "vae",
        vae,
        step_loss,
        [optimizer],
        STEPS,
        folder,
        average=0.99,
        every=lambda _, module: quality(module, held_out),
        evaluate_every=400,
        stop_at=stop_at,
    )
    finish(vae, quality(vae, held_out))
    vae.save_pretrained(folder / "vae")
    return vae.eval()


def finish(vae: AutoencoderKL, result: dict[str, float]) -> None:
    """Write the measured scaling and shift of the latents into the config."""
    vae.register_to_config(
        scaling_factor=round(1 / result["latent_std"], 4), shift_factor=round(result["latent_mean"], 4)
    )
