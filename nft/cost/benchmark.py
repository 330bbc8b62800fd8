"""Where an epoch's time goes, at a recipe's real shapes and with random weights: nothing is downloaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nft.compilation import compilation
from nft.config import Recipe
from nft.cost.micro_batch import device_memory, fit
from nft.models import configure, make_policy
from nft.objectives.nft import NFT
from nft.objectives.objective import Parts
from nft.optimization import make_optimizer
from nft.policy import ADAPTERS, Policy
from nft.preflight import builder_of
from nft.rollout import Rollout
from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import architecture_of
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.measure import timed
from stitchvm_reward.peaks import peak_teraflops
from stitchvm_reward.random_models import pixel_embedding, random_clip, random_generator, randomised
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.rewards.tail import RewardTail
from stitchvm_reward.stitching.benchmark import BLOCK, REWARD_BLOCK
from stitchvm_reward.stitching.config import load_stitch_recipe
from stitchvm_reward.stitching.value_model import ValueNetwork, read_config

COMPILED = ("rollout step", "training level", "reference", "stitched score")  # phases that model.compile compiles


def encode_cost(recipe: Recipe, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return milliseconds and GFLOP of one prompt through the text encoders, which are freed afterwards."""
    architecture = architecture_of(recipe.model.path)
    with torch.device("meta"):
        modules = architecture.family.text_modules(architecture, recipe.model.text_length)
    encoders = [(randomised(module, recipe.model.torch_dtype, device), length) for module, length in modules]

    @torch.no_grad()
    def encode() -> None:
        for encoder, length in encoders:
            encoder(torch.ones(1, length, dtype=torch.long, device=device))

    return {"phase": "encode a prompt"} | timed(encode, 1, device, repeats)


class RandomLearner:
    """What the loss asks of a learner: the policy and its network, on one process."""

    def __init__(self, policy: Policy, generator: Generator):
        self.policy, self.network, self.generator = policy, policy.network, generator

    @torch.no_grad()
    def frozen_velocity(self, adapter: str | None, latents: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        with self.policy.using(adapter):
            return self.generator.velocity(latents, t, conditions, self.network)


class Bench:
    """A recipe's policy, autoencoder and rewards with random weights, and one micro batch to work on."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.recipe, self.device = recipe, device
        vae_dtype = getattr(torch, recipe.model.vae_dtype)
        self.generator = random_generator(recipe.model, device, vae_dtype)
        configure(self.generator, recipe)
        self.policy = make_policy(recipe, self.generator)
        self.compiled = compilation(recipe.model, device).on
        if self.compiled:
            self.generator.compile_blocks()
        for adapter in ADAPTERS:
            for parameter in self.policy.tensors(adapter).values():
                parameter.data = torch.randn_like(parameter, device=device) * 0.01
        self.policy.old_is_current = recipe.train.old_schedule == 0 and recipe.train.updates_per_epoch == 1
        self.parameters = list(self.policy.tensors("current").values())
        self.optimizer = make_optimizer(recipe.train, self.parameters)
        learner: Any = RandomLearner(self.policy, self.generator)
        apart = replace(recipe.train, beta_kl=0.0)  # the base model's forward pass is measured on its own
        nothing: Any = None  # one process, and no rewards
        self.objective = NFT(Parts(apart, recipe.rollout, [], recipe.seed, self.generator, learner, nothing, nothing))
        self.rollout = self._rollout()

    def _rollout(self) -> Rollout:
        batch, architecture = self.recipe.rollout.micro_batch, architecture_of(self.recipe.model.path)
        with torch.device(self.device):
            zeros = self.generator.family.stand_in(architecture, 1, self.recipe.model.text_length)
        table = Conditions({name: torch.randn_like(tensor) for name, tensor in zeros.tensors.items()})
        window, sigmas = self.recipe.rollout.stop_window, self.generator.sigmas(self.recipe.rollout.steps)
        level = sigmas[sum(window) // 2] if window else 0.0
        return Rollout(
            list(range(batch)),
            [0] * batch,
            table.to(self.device, self.generator.dtype),
            torch.zeros(batch, dtype=torch.long, device=self.device),
            torch.randn(batch, *self.generator.latent_shape, device=self.device),
            torch.full((batch,), level, device=self.device),
            [level] * batch,
            worth=torch.rand(batch, device=self.device),
        )

    @torch.no_grad()
    def rollout_step(self) -> Tensor:
        """Run one solver step's forward pass of the old policy."""
        batch = len(self.rollout.samples)
        with self.policy.using("old"):
            sigma = torch.full((batch,), 0.8, device=self.device)
            return self.generator.velocity(self.rollout.anchor, sigma, self.rollout.conditions)

    @torch.no_grad()
    def decode(self) -> Tensor:
        """Decode the micro batch."""
        return self.generator.decode(self.rollout.anchor)

    def training_level(self) -> None:
        """Run one noise level of the micro batch: forward, the old policy's where needed, and backward."""
        t = torch.full((len(self.rollout.samples),), 0.9, device=self.device)
        loss, _ = self.objective.loss(self.rollout, t, 0, 0)
        loss.backward()

    def reference(self) -> Tensor:
        """Run the base model's forward pass, which a share of the levels has."""
        t = torch.full((len(self.rollout.samples),), 0.9, device=self.device)
        return self.objective.learner.frozen_velocity(None, self.rollout.anchor, t, self.rollout.conditions)

    def optimizer_step(self) -> None:
        """Clip and apply whatever gradient there is."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.train.max_gradient_norm)
        self.optimizer.step()

    def _stitched(self, reward: RewardRecipe) -> tuple[str, str, int, int]:
        """Return kind and CLIP model of a reward, and its blocks, from its folder or the recipe that builds it."""
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
        recipe = load_stitch_recipe(builder)
        return (
            recipe.reward.kind,
            recipe.reward.model,
            recipe.backbone.block or BLOCK,
            recipe.reward.block or REWARD_BLOCK,
        )

    def scorers(self) -> dict[str, Callable[[], Tensor]]:
        """Return one call for each CLIP tower's score of an image and for the stitched score of the same latents."""
        images = torch.rand(len(self.rollout.samples), 3, *[self.recipe.model.resolution] * 2, device=self.device)
        calls: dict[str, Callable[[], Tensor]] = {}
        for reward in self.recipe.rewards:
            if reward.kind != "value" and not reward.model:
                continue
            kind, model, block, cut = self._stitched(reward)
            clip, head = random_clip(model, self.device), BackboneHead.of(self.generator)
            width = head.width(block, self.generator.latent_shape[0])
            network: nn.Module = ValueNetwork(width, RewardTail(clip, cut)).to(self.device).eval()
            if self.compiled:
                network.compile()

            def stitched(network=network, head=head, block=block) -> Tensor:
                sigma = torch.full((len(self.rollout.samples),), 0.7, device=self.device)
                with torch.no_grad(), self.policy.using(None):
                    features = head.features(self.rollout.anchor, sigma, self.rollout.conditions, [block])[block]
                    return network(features)[1]

            def of_image(clip=clip, kind=kind) -> Tensor:
                with torch.no_grad():
                    return pixel_embedding(clip, kind, images)

            calls |= {f"score an image: {reward.name}": of_image, f"stitched score: {reward.name}": stitched}
        return calls


def _calls_per_sample(recipe: Recipe, phase: str) -> float:
    """Return how often one sample of an epoch goes through a phase."""
    window, samples = recipe.rollout.stop_window, recipe.rollout.groups * recipe.rollout.group_size
    name = phase.split(":")[0]
    if name == "rollout step":
        return sum(window) / 2 if window else recipe.rollout.steps
    if name in ("decode", "score an image"):
        return 0.0 if window else 1.0
    if name == "stitched score":
        return 1.0 if window else 0.0
    if name == "training level":
        return recipe.train.levels_per_sample
    if name == "reference":
        return recipe.train.levels_per_sample * recipe.train.reference_share
    return recipe.train.updates_per_epoch / samples if name == "optimizer step" else 0.0


def measure(recipe: Recipe, repeats: int, device: torch.device) -> dict[str, Any]:
    """Return rows by phase and their sums: milliseconds, GFLOP and peak MiB per sample, and its calls per epoch.

    A row's `share` is its part of the device's peak. Where `compilation` says so, phases of the transformer also have
    `compiled_regions`, the compiled regions that a call runs; a phase that runs none raises RuntimeError.
    `images_per_second` is what one process does of whole epochs, without evaluation and encoding. Raises InputError for
    a model whose shapes are not known here, or for another objective than nft.
    """
    if recipe.train.objective != "nft":
        raise InputError(
            f"only train.objective=nft can be measured, got {recipe.train.objective!r}: time a run instead"
        )
    recipe = fit(recipe, 1, device_memory())
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
    if recipe.train.beta_kl > 0:
        calls["reference"] = (bench.reference, batch)
    for name, (call, samples) in calls.items():
        compiled = bench.compiled and name.split(":")[0] in COMPILED
        rows.append({"phase": name} | timed(call, samples, device, repeats, compiled=compiled))
    peak, source = peak_teraflops(device, recipe.model.torch_dtype)
    for row in rows:
        row["calls"] = _calls_per_sample(recipe, row["phase"])
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


def lines(result: dict[str, Any]) -> list[str]:
    """Return the table that is printed of `measure`."""
    table = [f"{'per sample':36}{'ms':>10}{'GFLOP':>11}{'of peak':>9}{'peak MiB':>10}{'per epoch':>10}{'of time':>9}"]
    whole = sum(row["calls"] * row["milliseconds"] for row in result["rows"])
    for row in result["rows"]:
        memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        table.append(
            f"{row['phase']:36}{row['milliseconds']:10.2f}{row['gigaflop']:11.2f}{row['share']:9.1%}{memory:>10}"
            f"{row['calls']:10.4g}{row['calls'] * row['milliseconds'] / whole:9.1%}"
        )
    regions = [f"{row['phase']} {row['compiled_regions']}" for row in result["rows"] if "compiled_regions" in row]
    return [
        *table,
        *([f"compiled regions per call: {', '.join(regions)}"] if regions else []),
        f"peak {result['peak_teraflops']:.4g} TFLOP/s ({result['peak_from']})",
        f"{result['images_per_second']:.3g} images per second per process, {result['epoch_seconds']:.1f} s per epoch "
        "on one process",
    ]
