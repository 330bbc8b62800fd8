"""Images that the generator draws of prompts to learn from, kept as clean latents."""

import gc
import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stitchvm_reward.diffusion.generator import Generator, chosen_guidance, load_vae
from stitchvm_reward.diffusion.prompt_cache import fingerprint, load_text_pipeline
from stitchvm_reward.diffusion.solvers import solve
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import architecture_of
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.files import staged
from stitchvm_reward.hub import locate
from stitchvm_reward.prompts import read_prompts
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.recipe import require
from stitchvm_reward.steering.denoiser import Denoiser, Known
from stitchvm_reward.stitching.config import StitchRecipe

SHARD = 32  # images that are drawn and written together: what a killed process loses
PARTS = ("transformer", "scheduler")


def shuffled_prompts(texts: list[str], count: int, seed: int) -> list[str]:
    """Return `count` prompts: an endless shuffle of `texts`, in which each comes once per pass."""
    chosen: list[str] = []
    while len(chosen) < count:
        order = torch.randperm(
            len(texts), generator=randomness.at(seed, randomness.CAPTIONS, len(chosen) // len(texts))
        )
        chosen += [texts[place] for place in order.tolist()]
    return chosen[:count]


def check_generation(recipe: StitchRecipe) -> None:
    """Check that `data.generate` can be drawn, without reading weights. Raises InputError."""
    data = recipe.data
    read_prompts(data.generate.prompts, data.generate.column, data.generate.split)
    require(
        not data.limit, "data.limit is for data.images: the number of drawn images is data.generate.images", data.limit
    )
    architecture = architecture_of(recipe.model.path)
    chosen_guidance(architecture.family, architecture.transformer, recipe.model.guidance, recipe.model.path)


def guidance_of(recipe: StitchRecipe) -> tuple[list[float], bool]:
    """Return the guidance scales of drawn images, and whether the model reads them as an input. Raises InputError."""
    architecture = architecture_of(recipe.model.path)
    family, distilled = architecture.family, architecture.family.embeds_guidance(architecture.transformer)
    own = recipe.model.guidance if distilled else None
    return recipe.data.generate.guidance or [family.steering_guidance if own is None else own], distilled


class GeneratedImages:
    """The images of `data.generate`, with the interface of an `ImageSet`; `draw` makes those that are missing.

    Image n depends on the seed, on n, on the model and on the settings, not on how many images there are. Latents are
    stored in half precision, and images are decoded from what is stored.
    """

    def __init__(self, recipe: StitchRecipe, device: torch.device):
        self.settings, self.seed, self.device = recipe.data.generate, recipe.seed, device
        architecture = architecture_of(recipe.model.path)
        self.family, self.latent_shape = architecture.family, architecture.latent_shape(recipe.model.resolution)
        self.guidance, self.distilled = guidance_of(recipe)
        self.model = recipe.model
        texts = read_prompts(self.settings.prompts, self.settings.column, self.settings.split)
        whole = -(-self.settings.images // SHARD) * SHARD
        self.prompts = shuffled_prompts(texts, whole, recipe.seed)
        self.names = [f"generated image {index}" for index in range(self.settings.images)]
        identity = self._identity(texts)
        self.folder = Path(recipe.data.cache).expanduser() / f"generated-{identity[:32]}"
        self.key = hashlib.sha256(f"{identity}|{len(self)}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def _identity(self, texts: list[str]) -> str:
        """Identify the images by all that they depend on; networks by their files."""
        model, parts = self.model, (*PARTS, *self.family.text_parts)
        facts = {
            "networks": fingerprint(locate(model.path, tuple(f"{part}/*" for part in parts)), parts),
            "prompts": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
            "settings": [self.seed, self.guidance, self.settings.steps],
            "model": [model.dtype, model.resolution, model.text_length],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, in float32, loaded at its first use and kept until `free`."""
        return load_vae(self.model.path, self.device)

    def free(self) -> None:
        """Free the autoencoder."""
        self.__dict__.pop("vae", None)
        gc.collect()

    def caption(self, index: int) -> str:
        """Return the prompt of an image."""
        return self.prompts[index]

    def path(self, shard: int) -> Path:
        """Return where the latents of a shard are kept."""
        return self.folder / f"latents-{shard:06d}.safetensors"

    def missing(self) -> list[int]:
        """Return the shards that are not drawn yet."""
        return [shard for shard in range(len(self.prompts) // SHARD) if not self.path(shard).exists()]

    def latents(self, indices: list[int]) -> Tensor:
        """Return the clean latents of some images, (len(indices), channels, h, w) float32, on the CPU."""
        rows = []
        for index in indices:
            with safe_open(self.path(index // SHARD), framework="pt") as file:
                rows.append(file.get_slice("latents")[index % SHARD])
        return torch.stack(rows).float()

    @torch.no_grad()
    def load(self, index: int, side: int) -> Tensor | None:
        """Return an image, (3, side, side) float32 in [0, 1], on the device; `side` is the model's resolution."""
        return self.family.decode_latents(self.vae, self.latents([index]).to(self.device))[0]

    @torch.no_grad()
    def draw(self, shards: Iterable[int]) -> None:
        """Draw the images of `shards`; each is written whole or not at all.

        Text encoders and transformer are in memory together meanwhile: every prompt is encoded once, and nothing of
        it is kept. Raises InputError where a latent is not finite.
        """
        family, model = self.family, self.model
        folder = locate(model.path, tuple(f"{part}/*" for part in family.text_parts))
        pipeline = load_text_pipeline(family, folder, model.torch_dtype, self.device)
        generator = Generator.load(model, self.device)
        for shard in shards:
            scale, size = self.guidance[shard % len(self.guidance)], self.settings.micro_batch
            if self.distilled:
                generator.guidance = scale
            rows = range(shard * SHARD, (shard + 1) * SHARD)
            parts = [
                self._draw(generator, pipeline, scale, list(rows[start : start + size]))
                for start in range(0, SHARD, size)
            ]
            latents = torch.cat(parts)
            if not torch.isfinite(latents).all():
                raise InputError(f"{model.path} draws latents that are not finite in {model.dtype}")
            with staged(self.path(shard)) as file:
                save_file({"latents": latents.half().contiguous().cpu()}, file)
        del pipeline, generator
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _draw(self, generator: Generator, pipeline: Any, scale: float, rows: list[int]) -> Tensor:
        """Return the clean latents of some images, each from its own noise."""
        prompts, guided = [self.prompts[row] for row in rows], scale > 1 and not self.distilled
        tensors = self.family.encode(pipeline, [*prompts, ""] if guided else prompts, self.model.text_length)
        whole, places = Conditions(tensors), torch.arange(len(rows) + guided, device=self.device)
        denoiser = Denoiser(
            generator=generator,
            prompts=prompts,
            numbers=rows,
            conditions=whole.select(places[: len(rows)]),
            negative=whole.select(places[len(rows) :]) if guided else None,
            null_text=False,
            guidance=scale,
            steps=self.settings.steps,
            stochasticity=0.0,
            order=1,
            micro_batch=len(rows),
            seed=self.seed,
        )
        noise = randomness.noise(self.latent_shape, self.seed, randomness.GENERATION, 0, rows).to(self.device)
        return solve(lambda z, sigma: denoiser.velocity(z, sigma, Known()), noise, denoiser.sigmas)
