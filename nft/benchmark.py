"""Where an epoch's time goes, at a recipe's real shapes and with random weights: nothing is downloaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from nft.config import Recipe, RewardRecipe
from nft.models import make_optimizer, spare_memory
from nft.policy import Policy
from nft.preflight import builder_of
from nft.rollout import Rollout
from nft.update import rollout_loss
from stitchvm_reward.diffusion.architectures import configurations, text_configurations
from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.generator import Conditions
from stitchvm_reward.diffusion.solvers import sigma_schedule
from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards.tail import RewardTail
from stitchvm_reward.stitching.benchmark import (
    BLOCK,
    REWARD_BLOCK,
    pixel_embedding,
    random_clip,
    random_generator,
    randomised,
    timed,
)
from stitchvm_reward.stitching.config import load_stitch_recipe
from stitchvm_reward.stitching.value_model import ValueNetwork, read_config

# Dense bf16 TFLOP/s of the devices people train on, from their data sheets.
PEAKS = {"H100": 989.0, "H200": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0, "3090": 71.0}
MATRIX = 2048  # side of the product that stands for the peak of a device that is not listed


def peak_teraflops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """TFLOP/s that shares are taken of, and where the figure comes from."""
    if device.type == "cuda":
        for name, peak in PEAKS.items():
            if name in torch.cuda.get_device_name():
                return peak, f"{name} data sheet, dense bf16"
    a = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)
    found = timed(lambda: a @ a, 1, device, 5)
    return float(found["gigaflop"] or 0) / float(found["milliseconds"] or 1), f"a {MATRIX} x {MATRIX} product here"


def text_encoders(model: str, dtype: torch.dtype, device: torch.device) -> list[nn.Module]:
    """The three text encoders of a folder or a known hub id, with random weights."""
    with torch.device("meta"):
        first, second, third = text_configurations(model)
        made = [
            CLIPTextModelWithProjection(CLIPTextConfig(**first)),
            CLIPTextModelWithProjection(CLIPTextConfig(**second)),
            T5EncoderModel(T5Config(**third)),
        ]
    return [randomised(encoder, dtype, device) for encoder in made]


def encode_cost(recipe: Recipe, device: torch.device, repeats: int) -> dict[str, Any]:
    """Milliseconds and GFLOP of one prompt through the text encoders, which are gone afterwards."""
    encoders = text_encoders(recipe.model.path, getattr(torch, recipe.model.dtype), device)
    _, _, clip_tokens = configurations(recipe.model.path)
    lengths = (clip_tokens, clip_tokens, recipe.model.t5_length)

    @torch.no_grad()
    def encode() -> None:
        for encoder, length in zip(encoders, lengths):
            encoder(torch.ones(1, length, dtype=torch.long, device=device))

    return {"phase": "encode a prompt"} | timed(encode, 1, device, repeats)


class Bench:
    """A recipe's policy, autoencoder and rewards with random weights, and one micro batch to work on."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        model, lora = recipe.model, recipe.lora
        self.generator = random_generator(model.path, model.dtype, model.vae_dtype, model.resolution, device)
        spare_memory(self.generator, recipe)
        self.policy = Policy(self.generator.transformer, lora.rank, lora.alpha, lora.targets, recipe.seed)
        for adapter in ("current", "old", "ema"):
            for parameter in self.policy.tensors(adapter).values():
                parameter.data = torch.randn_like(parameter, device=device) * 0.01
        self.policy.old_is_current = recipe.train.old_schedule == 0 and recipe.train.updates_per_epoch == 1
        if model.compile:
            self.generator.compile_blocks()
        self.parameters = list(self.policy.tensors("current").values())
        self.optimizer = make_optimizer(recipe.train, self.parameters)
        self.rollout = self._rollout()

    def _rollout(self) -> Rollout:
        batch, config = self.recipe.rollout.micro_batch, self.generator.transformer.config
        _, _, clip_tokens = configurations(self.recipe.model.path)
        length = clip_tokens + self.recipe.model.t5_length
        tokens = torch.randn(1, length, config.joint_attention_dim, device=self.device)
        pooled = torch.randn(1, config.pooled_projection_dim, device=self.device)
        window = self.recipe.rollout.stop_window
        sigmas = sigma_schedule(self.recipe.rollout.steps, self.generator.shift)
        tau = torch.full((batch,), sigmas[sum(window) // 2] if window else 0.0, device=self.device)
        return Rollout(
            list(range(batch)),
            [0] * batch,
            Conditions(tokens.to(self.generator.dtype), pooled.to(self.generator.dtype)),
            torch.zeros(batch, dtype=torch.long, device=self.device),
            torch.randn(batch, *self.generator.latent_shape, device=self.device),
            tau,
            optimality=torch.rand(batch, device=self.device),
        )

    @torch.no_grad()
    def rollout_step(self) -> Tensor:
        """One solver step's forward by the old policy."""
        batch = len(self.rollout.samples)
        with self.policy.using("old"):
            sigma = torch.full((batch,), 0.8, device=self.device)
            return self.generator.velocity(self.rollout.anchor, sigma, self.rollout.conditions)

    @torch.no_grad()
    def decode(self) -> Tensor:
        """Images of the micro batch."""
        return self.generator.decode(self.rollout.anchor)

    def training_level(self) -> None:
        """One noise level of the micro batch: every forward that the recipe needs, and the backward pass."""
        t = torch.full((len(self.rollout.samples),), 0.9, device=self.device)
        network = self.generator.transformer
        loss, _ = rollout_loss(self.recipe, self.generator, network, self.policy, self.rollout, t, 0, 0)
        loss.backward()

    def optimizer_step(self) -> None:
        """Clip and apply whatever gradient there is."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.train.max_gradient_norm)
        self.optimizer.step()

    def _stitched(self, reward: RewardRecipe) -> tuple[str, str, int, int]:
        """Kind and CLIP model of a reward, and the blocks that it is stitched at: its folder's, or its recipe's."""
        if reward.kind != "value":
            return reward.kind, reward.model, BLOCK, REWARD_BLOCK
        folder = Path(reward.value_model).expanduser()
        if folder.is_dir():
            config = read_config(folder)
            stitched = config["reward"]
            return stitched["kind"], stitched["path"], config["backbone"]["block"], stitched["block"]
        builder = builder_of(folder)
        if builder is None:
            raise InputError(f"value model not found: {reward.value_model}, and no recipe in recipes/stitch builds it")
        own = load_stitch_recipe(builder)
        return own.reward.kind, own.reward.model, own.backbone.block or BLOCK, own.reward.block or REWARD_BLOCK

    def scorers(self) -> dict[str, Callable[[], Tensor]]:
        """One call for each CLIP tower's image score and for the stitched score of the same latents."""
        images = torch.rand(len(self.rollout.samples), 3, *[self.recipe.model.resolution] * 2, device=self.device)
        calls: dict[str, Callable[[], Tensor]] = {}
        for reward in self.recipe.rewards:
            if reward.kind == "function":
                continue
            kind, model, block, cut = self._stitched(reward)
            clip, head = random_clip(model, self.device), BackboneHead(self.generator.transformer)
            network = ValueNetwork(head.width(block), RewardTail(clip, cut)).to(self.device).eval()

            def stitched(network=network, head=head, block=block) -> Tensor:
                sigma = torch.full((len(self.rollout.samples),), 0.7, device=self.device)
                with torch.no_grad(), self.policy.using(None):
                    features = head.features(self.rollout.anchor, sigma, self.rollout.conditions, [block])[block]
                    return network(features)[1]

            def judged(clip=clip, kind=kind) -> Tensor:
                with torch.no_grad():
                    return pixel_embedding(clip, kind, images)

            calls |= {f"judge an image: {reward.name}": judged, f"stitched score: {reward.name}": stitched}
        return calls


def _calls_a_sample(recipe: Recipe, phase: str) -> float:
    """How often one sample of an epoch goes through a phase."""
    window, samples = recipe.rollout.stop_window, recipe.rollout.groups * recipe.rollout.group_size
    name = phase.split(":")[0]
    if name == "rollout step":
        return sum(window) / 2 if window else recipe.rollout.steps
    if name in ("decode", "judge an image"):
        return 0.0 if window else 1.0
    if name == "stitched score":
        return 1.0 if window else 0.0
    if name == "training level":
        return recipe.train.levels_per_sample
    return recipe.train.updates_per_epoch / samples if name == "optimizer step" else 0.0


def measure(recipe: Recipe, repeats: int, device: torch.device) -> dict[str, Any]:
    """Rows by phase and what they come to: milliseconds, GFLOP and peak MiB of one sample, and its calls an epoch.

    A row's `share` is its part of the device's peak; `images_per_second` is what one process does of whole epochs,
    evaluation and encoding left out. Raises InputError for a model whose shape is not known here, or another objective.
    """
    if recipe.train.objective != "nft":
        raise InputError(
            f"only train.objective=nft can be measured, got {recipe.train.objective!r}: time a run instead"
        )
    batch = recipe.rollout.micro_batch
    rows = [encode_cost(recipe, device, repeats)]
    bench = Bench(recipe, device)
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "rollout step": (bench.rollout_step, batch),
        "decode": (bench.decode, batch),
        **{name: (call, batch) for name, call in bench.scorers().items()},
        "training level": (bench.training_level, batch),
        "optimizer step": (bench.optimizer_step, 1),
    }
    rows += [{"phase": name} | timed(call, samples, device, repeats) for name, (call, samples) in calls.items()]
    peak, source = peak_teraflops(device, getattr(torch, recipe.model.dtype))
    for row in rows:
        row["calls"] = _calls_a_sample(recipe, row["phase"])
        row["share"] = row["gigaflop"] / row["milliseconds"] / peak
    seconds = sum(row["calls"] * row["milliseconds"] for row in rows) / 1e3
    return {
        "rows": rows,
        "peak_teraflops": peak,
        "peak_from": source,
        "images_per_second": 1 / seconds,
        "epoch_seconds": seconds * recipe.rollout.groups * recipe.rollout.group_size,
        "micro_batch": batch,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The table that is printed of `measure`."""
    told = [f"{'a sample':36}{'ms':>10}{'GFLOP':>11}{'of peak':>9}{'peak MiB':>10}{'an epoch':>10}{'of time':>9}"]
    whole = sum(row["calls"] * row["milliseconds"] for row in found["rows"])
    for row in found["rows"]:
        memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        told.append(
            f"{row['phase']:36}{row['milliseconds']:10.2f}{row['gigaflop']:11.2f}{row['share']:9.1%}{memory:>10}"
            f"{row['calls']:10.4g}{row['calls'] * row['milliseconds'] / whole:9.1%}"
        )
    return [
        *told,
        f"peak {found['peak_teraflops']:.4g} TFLOP/s ({found['peak_from']})",
        f"{found['images_per_second']:.3g} images a second a process, an epoch {found['epoch_seconds']:.1f} s on one",
    ]
