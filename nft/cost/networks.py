"""A recipe's networks on the meta device: shapes and number formats without weights."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from nft.config import Recipe
from nft.models import configure
from nft.policy import Policy
from nft.preflight import builder_of
from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.generator import Generator, chosen_guidance
from stitchvm_reward.families import architecture_of
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.hub import is_hub_id
from stitchvm_reward.random_models import pixel_embedding
from stitchvm_reward.rewards.architectures import CLIPS, clip_configuration
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.rewards.tail import RewardTail
from stitchvm_reward.stitching.benchmark import BLOCK, REWARD_BLOCK
from stitchvm_reward.stitching.config import load_stitch_recipe
from stitchvm_reward.stitching.value_model import ValueNetwork, empty_network, read_config

META = torch.device("meta")


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


@lru_cache(maxsize=16)
def clip_without_weights(model: str) -> CLIPModel | None:
    """Return a float32 CLIP model on the meta device; None for a hub id whose shapes are not known."""
    if is_hub_id(model) and model not in CLIPS:
        return None
    with META:
        return CLIPModel(CLIPConfig(**clip_configuration(model))).requires_grad_(False)


class Networks:
    """What a run of a recipe has on its device. Raises InputError for a model whose shapes are not known here.

    `pixel` are the CLIP models that score images, with the kind of their reward; `values` are the networks of value
    models, each with its number of backbone blocks. A value model that is not built yet has the shapes that its recipe
    in recipes/stitch gives it; where there is no such recipe, it is left out.
    """

    def __init__(self, recipe: Recipe):
        model, architecture = recipe.model, architecture_of(recipe.model.path)
        family = architecture.family
        self.recipe, self.architecture = recipe, architecture
        with META:
            transformer = family.transformer.from_config(dict(architecture.transformer)).to(model.torch_dtype)
            vae = family.autoencoder.from_config(dict(architecture.vae)).to(getattr(torch, model.vae_dtype))
            self.prompt = family.stand_in(architecture, 1, model.text_length).to(META, model.torch_dtype)
        guidance = chosen_guidance(family, architecture.transformer, model.guidance, model.path)
        options: dict[str, Any] = {"scheduler": architecture.scheduler, "resolution": model.resolution}
        self.generator = Generator(family, transformer, vae, guidance=guidance, **options)
        self.base_bytes, self.vae_bytes = module_bytes(transformer), module_bytes(vae)
        self.base_parameters = sum(p.numel() for p in transformer.parameters())
        configure(self.generator, recipe)
        targets = recipe.lora.targets or list(family.lora_targets)
        with META:
            self.policy = Policy(transformer, recipe.lora.rank, recipe.lora.alpha, targets, recipe.seed)
        self.pixel: list[tuple[str, CLIPModel]] = []
        self.values: list[tuple[int, ValueNetwork]] = []
        self.head = BackboneHead.of(self.generator)
        for reward in recipe.rewards:
            self._add(reward)

    def _add(self, reward: RewardRecipe) -> None:
        kind, model = reward.kind, reward.model
        if reward.kind == "value":
            folder = Path(reward.value_model).expanduser()
            builder = None if folder.is_dir() else reward.stitch or builder_of(folder)
            if folder.is_dir():
                config = read_config(folder)
                kind, model = config["reward"]["kind"], config["reward"]["path"]
                network, block = empty_network(config, self.head), config["backbone"]["block"]
            elif builder is not None:
                stitch = load_stitch_recipe(builder)
                kind, model, block = stitch.reward.kind, stitch.reward.model, stitch.backbone.block or BLOCK
                clip, width = clip_without_weights(model), self.head.width(block, self.generator.latent_shape[0])
                if clip is None:
                    return
                with META:
                    network = ValueNetwork(width, RewardTail(clip, stitch.reward.block or REWARD_BLOCK))
            else:
                return
            self.values.append((block, network.eval().requires_grad_(False)))
        if model and (clip := clip_without_weights(model)) is not None:
            self.pixel.append((kind, clip))

    def conditions(self, count: int) -> Conditions:
        """Return the conditions of a micro batch, which is a copy of rows of the epoch's table."""
        return self.prompt.select(torch.zeros(count, dtype=torch.long, device=META))

    def latents(self, count: int) -> Tensor:
        return torch.zeros(count, *self.generator.latent_shape, device=META)

    def velocity(self, latents: Tensor, conditions: Conditions, adapter: str | None) -> Tensor:
        with self.policy.using(adapter):
            return self.generator.velocity(latents, torch.zeros(len(latents), device=META), conditions)

    def adopt(self, adapter: str) -> None:
        """Switch to an adapter and back, which makes what the network keeps of it."""
        with self.policy.using(adapter):
            pass

    def score(self, images: Tensor) -> Tensor:
        """Return the summed embeddings of images by all CLIP models, (batch,)."""
        sums = [pixel_embedding(clip, kind, images).float().sum(-1) for kind, clip in self.pixel]
        return torch.stack(sums).sum(0) if sums else images.flatten(1).sum(1)

    def value(self, latents: Tensor) -> Tensor:
        """Return the summed embeddings of noisy latents by all value models, (batch,), from one backbone pass."""
        if not self.values:
            return latents.flatten(1).sum(1)
        prompt, level = self.prompt.expand(len(latents)), torch.zeros(len(latents), device=META)
        with self.policy.using(None):
            features = self.head.features(latents, level, prompt, [block for block, _ in self.values])
            return torch.stack([network(features[block])[1].float().sum(-1) for block, network in self.values]).sum(0)

    def text_encoders(self) -> list[tuple[nn.Module, int]]:
        """Return the text encoders in the model's number format, and how many tokens each reads."""
        with META:
            modules = self.architecture.family.text_modules(self.architecture, self.recipe.model.text_length)
        return [(module.to(self.recipe.model.torch_dtype).requires_grad_(False), length) for module, length in modules]
