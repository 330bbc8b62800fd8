"""A FLUX-class generator for the miniature's autoencoder and text encoders, distilled from the first generator.

Like FLUX.1-dev it is distilled with guidance: a guidance embedding takes the place of the second forward pass of
classifier-free guidance. Its text inputs are FLUX's own: T5 tokens, and the pooled output of one CLIP tower.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModel

from miniature import scenes, wording
from miniature.assemble import WEIGHTS
from miniature.generator import draw_noised, encode_pool, verdict
from miniature.smaller import FIRST, embed
from miniature.training import train
from stitchvm_reward.families.flux import image_positions, pack

FOLDER = WEIGHTS / "flux"
DOUBLE, SINGLE = 3, 5  # blocks of each kind
STEPS = 5000
BATCH = 64
GUIDANCE = (1.0, 5.0)  # range of the guidance scales that are distilled
SIDE = scenes.SIZE // 16  # packed latent patches along one side


def new_transformer() -> FluxTransformer2DModel:
    """A transformer whose blocks begin as the identity, which trains sooner than the library's initialisation."""
    network = FluxTransformer2DModel(
        in_channels=64,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=192,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    identity = [norm.linear for block in network.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    identity += [block.norm.linear for block in network.single_transformer_blocks]
    zeros = [*identity, network.norm_out.linear, network.proj_out, network.time_text_embed.guidance_embedder.linear_2]
    for layer in zeros:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return network


@torch.no_grad()
def start_from(network: FluxTransformer2DModel, teacher: SD3Transformer2DModel) -> None:
    """Copy into `network` what the two architectures share.

    These are the double blocks (Stable Diffusion 3's second attention is left out), the embeddings of patches, text
    and time, and the output layer, whose patches the two order differently.
    """
    for block, source in zip(network.transformer_blocks, teacher.transformer_blocks):
        for name in ("attn", "ff", "ff_context"):
            getattr(block, name).load_state_dict(getattr(source, name).state_dict())
        for name in ("norm1", "norm1_context"):
            layer, given = getattr(block, name).linear, getattr(source, name).linear
            layer.weight.copy_(given.weight[: len(layer.weight)])  # what follows modulates the second attention
            layer.bias.copy_(given.bias[: len(layer.bias)])
    network.x_embedder.weight.copy_(teacher.pos_embed.proj.weight.flatten(1))
    network.x_embedder.bias.copy_(teacher.pos_embed.proj.bias)
    network.context_embedder.load_state_dict(teacher.context_embedder.state_dict())
    network.time_text_embed.timestep_embedder.load_state_dict(teacher.time_text_embed.timestep_embedder.state_dict())
    network.norm_out.load_state_dict(teacher.norm_out.state_dict())
    order = (
        torch.arange(64).view(2, 2, 16).permute(2, 0, 1).flatten()
    )  # (row, column, channel) to (channel, row, column)
    network.proj_out.weight.copy_(teacher.proj_out.weight[order])
    network.proj_out.bias.copy_(teacher.proj_out.bias[order])


def velocity(
    network: FluxTransformer2DModel, noised: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor, guidance: Tensor
) -> Tensor:
    """Packed velocity (batch, patches, 64) of latents (batch, 16, h, w) at levels `sigma`, (batch,)."""
    places = image_positions((SIDE, SIDE), noised.device)
    return network(
        pack(noised), tokens, pooled, sigma, places, torch.zeros(tokens.shape[1], 3), guidance, return_dict=False
    )[0]


def optimizers(network: FluxTransformer2DModel) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inside = "transformer_blocks" in name and parameter.ndim == 2 and "norm" not in name
        (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=1.5e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=4),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


@torch.no_grad()
def pooled_outputs(captions: list[str]) -> Tensor:
    """Pooled CLIP outputs (count, 128) in half precision, as FluxPipeline reads them."""
    tower = CLIPTextModel.from_pretrained(FIRST / "text_encoder", dtype=torch.float32).eval()
    tokens = wording.clip_tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.cat([tower(part).pooler_output.half() for part in tokens.split(1000)])


def pretrain(folder: Path, drawn: list[scenes.Scene], pool: Tensor, stop_at: int | None = None) -> None:
    """Teach the network the first generator's guided velocity on the pool's noised latents; resumable from `folder`.

    Reads weights/sd3 and writes weights/flux/transformer in half precision.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusion3Pipeline.from_pretrained(FIRST, dtype=torch.float32)
    teacher = pipeline.transformer.eval().requires_grad_(False)
    latents = encode_pool(pipeline.vae, pool, folder / "latents.safetensors")
    captions = list(dict.fromkeys(["", *(scene.caption for scene in drawn)]))
    tokens, pooled = embed(pipeline, captions)
    clip = pooled_outputs(captions)
    known = {caption: number for number, caption in enumerate(captions)}
    numbers = torch.tensor([known[scene.caption] for scene in drawn])
    network = new_transformer().train()
    start_from(network, teacher)
    # The library casts the timestep to the type of the embedded patches: autocast must not round it to bfloat16.
    hook = network.x_embedder.register_forward_hook(lambda module, inputs, output: output.float())

    def step_loss(step: int, random: torch.Generator):
        _, _, sigma, noised, caption = draw_noised(latents, numbers, BATCH, random)
        low, high = GUIDANCE
        scale = low + (high - low) * torch.rand(BATCH, generator=random)
        both = torch.cat([caption, torch.zeros_like(caption)])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                target = teacher(
                    noised.repeat(2, 1, 1, 1),
                    tokens[both].float(),
                    pooled[both].float(),
                    sigma.repeat(2) * 1000,
                    return_dict=False,
                )[0]
            text = tokens[caption, wording.LENGTH :].float()
            predicted = velocity(network, noised, sigma, text, clip[caption].float(), scale)
        conditional, unconditional = target.float().chunk(2)
        wanted = unconditional + scale.view(-1, 1, 1, 1) * (conditional - unconditional)
        return F.mse_loss(predicted.float(), pack(wanted)), {}

    train(
        "flux", network, step_loss, optimizers(network), STEPS, folder, average=0.999, save_every=200, stop_at=stop_at
    )
    hook.remove()
    network.half().save_pretrained(FOLDER / "transformer")
    assemble()


LINKS = {"vae": "vae", "text_encoder_2": "text_encoder_3", "tokenizer": "tokenizer", "tokenizer_2": "tokenizer_3"}


def assemble() -> None:
    """Write what the pipeline needs beside its transformer; the parts that it shares with the first are links."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, source in LINKS.items():
        (FOLDER / name).unlink(missing_ok=True)
        (FOLDER / name).symlink_to(Path("..") / FIRST.name / source)
    first = StableDiffusion3Pipeline.from_pretrained(FIRST, dtype=torch.float32)
    tower = CLIPTextModel.from_pretrained(FIRST / "text_encoder", dtype=torch.float16)
    # The schedule depends on the resolution, as FLUX.1's does; at 64 px its shift is the first generator's, 3.
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=round(math.log(3), 4),
        max_shift=1.5,
        base_image_seq_len=SIDE**2,
        max_image_seq_len=(4 * SIDE) ** 2,
    )
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=first.vae,
        text_encoder=tower,
        tokenizer=first.tokenizer,
        text_encoder_2=first.text_encoder_3,
        tokenizer_2=first.tokenizer_3,
        transformer=FluxTransformer2DModel.from_pretrained(FOLDER / "transformer"),
    )
    pipeline.save_config(FOLDER)
    scheduler.save_pretrained(FOLDER / "scheduler")
    tower.save_pretrained(FOLDER / "text_encoder")


@torch.no_grad()
def quality(guidance: float = 3.5, count: int = 200, steps: int = 25) -> dict[str, float]:
    """Return checker results and true aesthetic of the pipeline on held-out captions of one and two shapes.

    The captions and the noise are those of `smaller.quality`; plain Euler steps, float32.
    """
    pipeline = FluxPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    chosen = scenes.draw_scenes(count, 914, held_out=True, shares=(0.5, 0.5, 0.0))
    noise = torch.randn(count, 16, scenes.SIZE // 8, scenes.SIZE // 8, generator=torch.Generator().manual_seed(915))
    images = pipeline(
        [scene.caption for scene in chosen],
        height=scenes.SIZE,
        width=scenes.SIZE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=wording.LENGTH,
        latents=pack(noise),
        output_type="pt",
    ).images
    return verdict(chosen, images)


def measure() -> None:
    """Put the pipeline's quality at several guidance scales under "flux" in the quality table."""
    path = WEIGHTS.parent / "quality.json"
    table = json.loads(path.read_text())
    table["flux"] = {f"guidance {scale:g}": quality(scale) for scale in (1.0, 2.0, 3.5)}
    path.write_text(json.dumps(table, indent=2) + "\n")
    print(json.dumps(table["flux"], indent=2))
