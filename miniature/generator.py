"""Pretraining of the miniature's SD3Transformer2DModel together with its T5 encoder, on cached latents."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5EncoderModel

from miniature import checker, scenes, wording
from miniature.clip import PROJECTION, SECOND_WIDTH, Towers, tokenize
from miniature.training import train

STEPS = 6200
BATCH = 128
WIDTH = 192
DROP_CAPTION = 0.1
DROP_TOWER = 0.46  # the rate of the Stable Diffusion 3 paper, section 4.3, for each text tower by itself


class Generator(nn.Module):
    """The transformer and the T5 encoder whose tokens it reads; the CLIP towers stay frozen outside."""

    def __init__(self):
        super().__init__()
        self.transformer = SD3Transformer2DModel(
            sample_size=scenes.SIZE // 8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=6,
            attention_head_dim=64,
            num_attention_heads=WIDTH // 64,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=256,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1, 2),
            qk_norm="rms_norm",
        )
        # Blocks that start as the identity train sooner; the library leaves their modulation random.
        for block in self.transformer.transformer_blocks:
            for norm in (block.norm1, block.norm1_context):
                nn.init.zeros_(norm.linear.weight)
                nn.init.zeros_(norm.linear.bias)
        for layer in (self.transformer.norm_out.linear, self.transformer.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        tokenizer = wording.t5_tokenizer()
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=WIDTH,
                d_kv=32,
                d_ff=2 * WIDTH,
                num_layers=2,
                num_heads=6,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                relative_attention_num_buckets=16,
            )
        )

    def velocity(self, latents, sigma, t5_tokens, clip_hidden, pooled):
        """Velocity at noise level sigma in [0, 1], (batch,), for prompts given as T5 ids and CLIP features."""
        context = torch.cat([clip_hidden, self.t5(t5_tokens).last_hidden_state], dim=1)
        return self.transformer(latents, context, pooled, sigma * 1000, return_dict=False)[0]


class Captions:
    """Caption features kept once per distinct caption; `""` is number 0."""

    def __init__(self, captions: list[str], towers: Towers):
        distinct = list(dict.fromkeys(["", *captions]))
        self.number = {caption: index for index, caption in enumerate(distinct)}
        self.clip_hidden, self.pooled = encode_clip(distinct, towers)
        self.t5_tokens = t5_tokenize(distinct)

    def select(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.t5_tokens[numbers], self.clip_hidden[numbers].float(), self.pooled[numbers].float()

    def select_some(self, numbers: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, ...]:
        """As `select`, with each CLIP tower now and then seeing the empty caption.

        A CLIP embedding names a whole combination of facts at once; a model that could always lean on it learns
        the combinations it has seen, not how to put a new one together from words.
        """
        tokens, hidden, pooled = self.select(numbers)
        empty_hidden, empty_pooled = self.clip_hidden[0].float(), self.pooled[0].float()
        sizes = {"hidden": (hidden.shape[-1] - SECOND_WIDTH, SECOND_WIDTH), "pooled": (PROJECTION, PROJECTION)}
        dropped = torch.rand(len(numbers), 2, generator=random) < DROP_TOWER
        first = dropped.repeat_interleave(torch.tensor(sizes["hidden"]), dim=1)[:, None]
        second = dropped.repeat_interleave(torch.tensor(sizes["pooled"]), dim=1)
        return tokens, torch.where(first, empty_hidden, hidden), torch.where(second, empty_pooled, pooled)


def t5_tokenize(captions: list[str]) -> torch.Tensor:
    """(len(captions), LENGTH) T5 token ids."""
    return wording.t5_tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def encode_clip(captions: list[str], towers: Towers) -> tuple[torch.Tensor, torch.Tensor]:
    """Penultimate hidden states of both CLIP towers side by side and both pooled embeddings, in half precision."""
    hidden, pooled = [], []
    for tokens in tokenize(captions).split(1000):
        first = towers.clip.text_model(tokens, output_hidden_states=True)
        second = towers.second(tokens, output_hidden_states=True)
        hidden.append(torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1).half())
        pooled.append(torch.cat([towers.clip.text_projection(first.pooler_output), second.text_embeds], -1).half())
    return torch.cat(hidden), torch.cat(pooled)


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pool: torch.Tensor, path: Path) -> torch.Tensor:
    """Scaled latents of the pool, (count, 16, 8, 8) in half precision, computed once and kept in `path`."""
    if not path.exists():
        parts = []
        for images in pool.split(200):
            images = (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            parts.append(vae.encode(images).latent_dist.mode().half())
        save_file({"latents": torch.cat(parts).contiguous()}, path)
    latents = load_file(path)["latents"].float()
    return ((latents - vae.config.shift_factor) * vae.config.scaling_factor).half()


@torch.no_grad()
def sample(generator: Generator, captions: list[str], towers: Towers, steps: int, seed: int) -> torch.Tensor:
    """Latents of plain Euler sampling on the shift-3 schedule, without guidance."""
    known = Captions(captions, towers)
    conditions = known.select(torch.tensor([known.number[caption] for caption in captions]))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    latents = torch.randn(len(captions), 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    for sigma, following in zip(scheduler.sigmas, scheduler.sigmas[1:]):
        velocity = generator.velocity(latents, sigma.expand(len(captions)), *conditions)
        latents = latents + (following - sigma) * velocity
    return latents


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] of scaled latents."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return torch.cat([(vae.decode(part).sample / 2 + 0.5).clamp(0, 1) for part in latents.split(64)])


def verdict(chosen: list[scenes.Scene], images: torch.Tensor) -> dict[str, float]:
    """What the checker and the true aesthetic score say of pictures of scenes with one and two shapes."""
    strict, graded = checker.check_captions([scene.caption for scene in chosen], images)
    single = torch.tensor([len(scene.radii) == 1 for scene in chosen])
    return {
        "strict": float(strict.mean()),
        "strict_one": float(strict[single].mean()),
        "strict_two": float(strict[~single].mean()),
        "graded": float(graded.mean()),
        "true_aesthetic": float(scenes.true_aesthetic(images).mean()),
    }


def quality(generator: Generator, vae: AutoencoderKL, towers: Towers, count: int, steps: int) -> dict[str, float]:
    """Checker results on held-out captions of one and two shapes."""
    generator.eval()
    chosen = scenes.draw_scenes(count, seed=904, held_out=True, shares=(0.5, 0.5, 0.0))
    captions = [scene.caption for scene in chosen]
    images = decode(vae, sample(generator, captions, towers, steps, seed=905))
    generator.train()
    return verdict(chosen, images)


def optimizers(generator: Generator) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for modulations, embeddings, norms and the output layer."""
    inside = ("transformer_blocks", "t5.encoder.block")
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in generator.named_parameters():
        hidden = any(part in name for part in inside) and parameter.ndim == 2
        plain = "norm1" not in name and "relative_attention_bias" not in name
        (matrices if hidden and plain else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=4),
        torch.optim.AdamW(others, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def draw_noised(
    latents: torch.Tensor, numbers: torch.Tensor, batch: int, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch to train on: clean latents, noise, levels in [0, 1] (batch,), mostly in their middle, the latents noised
    to them, and caption numbers, some of them 0: the empty caption."""
    chosen = torch.randint(len(latents), (batch,), generator=random)
    clean = latents[chosen].float()
    noise = torch.randn(clean.shape, generator=random)
    t = torch.sigmoid(torch.randn(batch, generator=random) + 0.4)
    sigma = torch.where(torch.rand(batch, generator=random) < 0.15, torch.rand(batch, generator=random), t)
    caption = numbers[chosen] * (torch.rand(batch, generator=random) >= DROP_CAPTION)
    return clean, noise, sigma, torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1)), caption


def pretrain(
    folder: Path,
    drawn: list[scenes.Scene],
    pool: torch.Tensor,
    vae: AutoencoderKL,
    towers: Towers,
    stop_at: int | None = None,
) -> Generator:
    """Flow matching on the pool's latents with captions dropped now and then; resumable."""
    torch.manual_seed(0)
    generator = Generator()
    latents = encode_pool(vae, pool, folder / "latents.safetensors")
    known = Captions([scene.caption for scene in drawn], towers)
    numbers = torch.tensor([known.number[scene.caption] for scene in drawn])

    def step_loss(step: int, random: torch.Generator):
        clean, noise, sigma, noised, caption = draw_noised(latents, numbers, BATCH, random)
        velocity = generator.velocity(noised, sigma, *known.select_some(caption, random))
        return F.mse_loss(velocity, noise - clean), {}

    train(
        "generator",
        generator,
        step_loss,
        optimizers(generator),
        STEPS,
        folder,
        average=0.999,
        every=lambda *_: quality(generator, vae, towers, 100, 12),
        evaluate_every=500,
        stop_at=stop_at,
    )
    generator.transformer.save_pretrained(folder / "transformer")
    generator.t5.save_pretrained(folder / "t5")
    return generator.eval()
