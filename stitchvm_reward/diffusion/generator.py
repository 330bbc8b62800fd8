"""A frozen generator of any family: loading, velocity, partial passes and decoding at one resolution."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import family_of, family_of_class
from stitchvm_reward.families.family import Conditions, Family
from stitchvm_reward.hub import locate


def load_vae(model: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """Load the frozen autoencoder of a folder or a hub id. Raises InputError where there is none."""
    family, folder = family_of(model), locate(model, ("vae/*",))
    try:
        vae = family.autoencoder.from_pretrained(folder, subfolder="vae", dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{model} has no autoencoder: {str(error).splitlines()[0]}") from None
    return vae.to(device).eval().requires_grad_(False)


def chosen_guidance(family: Family, config: Mapping[str, Any], guidance: float | None, model: str) -> float | None:
    """Return the guidance scale that a transformer of this configuration is given, None where it reads none.

    `guidance` is what the recipe asks for. Raises InputError where it asks a model that has no such input.
    """
    if family.embeds_guidance(config):
        return family.guidance if guidance is None else guidance
    if guidance is not None:
        raise InputError(
            f"model.guidance is {guidance:g}, but {model} reads no guidance scale: remove it (steering has guidance of "
            "its own)"
        )
    return None


class Generator:
    """The frozen transformer and autoencoder of a model, for square images with sides of `resolution` pixels.

    `scheduler` is the scheduler's configuration and `guidance` the embedded guidance scale, None for models without.
    The transformer runs in `dtype`, the autoencoder in its own.
    """

    def __init__(
        self,
        family: Family,
        transformer: Any,
        vae: Any,
        *,
        scheduler: Mapping[str, Any],
        resolution: int,
        guidance: float | None = None,
    ):
        self.family, self.scheduler, self.resolution, self.guidance = family, scheduler, resolution, guidance
        self.transformer: Any = transformer.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.device, self.dtype = transformer.device, transformer.dtype
        side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (int(vae.config.latent_channels), side, side)
        self.sigmas = cache(self._sigmas)

    @classmethod
    def load(
        cls,
        model: ModelRecipe,
        device: torch.device,
        vae_dtype: torch.dtype = torch.float32,
        transformer: Any = None,
    ) -> "Generator":
        """Load from a folder or a hub id. Raises InputError where it does not fit.

        `transformer` is the folder's transformer where it has been loaded already, such as in shards.
        """
        family = family_of(model.path)
        folder = locate(model.path, ("transformer/*", "vae/*", "scheduler/*"))
        try:
            if transformer is None:
                transformer = family.transformer.from_pretrained(
                    folder, subfolder="transformer", dtype=model.torch_dtype, use_safetensors=True
                ).to(device)
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler").config
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{model.path} is not a complete {family.name} pipeline folder: {reason}") from None
        guidance = chosen_guidance(family, transformer.config, model.guidance, model.path)
        vae = load_vae(model.path, device, vae_dtype)
        return cls(
            family,
            transformer,
            vae,
            scheduler=scheduler,
            resolution=model.resolution,
            guidance=guidance,
        )

    @classmethod
    def of_pipeline(cls, pipeline: Any, resolution: int, guidance: float | None = None) -> "Generator":
        """Take the networks of a loaded diffusers pipeline. Raises InputError for one of another family.

        `guidance` is what a guidance-distilled model is given; other models ignore it.
        """
        family = family_of_class(type(pipeline).__name__, "the pipeline")
        distilled = family.embeds_guidance(pipeline.transformer.config)
        return cls(
            family,
            pipeline.transformer,
            pipeline.vae,
            scheduler=pipeline.scheduler.config,
            resolution=resolution,
            guidance=chosen_guidance(
                family, pipeline.transformer.config, guidance if distilled else None, "the pipeline"
            ),
        )

    def _sigmas(self, steps: int) -> list[float]:
        """Return the levels of a solver of so many steps, from 1 to 0."""
        return self.family.schedule(self.scheduler, steps, self.latent_shape)

    @property
    def blocks(self) -> list[Any]:
        """The transformer's blocks in the order in which they run."""
        return self.family.blocks(self.transformer)

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, network: nn.Module | None = None
    ) -> Tensor:
        """Return the velocity (batch, channels, h, w) in the network's dtype at levels `sigma` in [0, 1], (batch,).

        `network` stands in for the transformer where it is wrapped for training. Levels stay floating-point numbers.
        """
        network = self.transformer if network is None else network
        level = sigma.to(self.device, torch.float32)
        inputs = self.family.inputs(latents.to(self.dtype), level, conditions, self.guidance)
        return self.family.velocity(network(**inputs)[0], tuple(latents.shape))

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (batch, 3, resolution, resolution), float32 in [0, 1], of clean latents; differentiable."""
        return self.family.decode_latents(self.vae, latents)

    def encode(self, images: Tensor) -> Tensor:
        """Return clean latents (batch, channels, h, w), float32, of images in [0, 1]."""
        return self.family.encode_images(self.vae, images)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each transformer block at its first call, for every adapter, shape and kind of block it meets."""
        # Reference, rollout, training and evaluation are variants of one block's code, and so are the kinds of blocks
        # and a last, smaller batch. That is more than the compiler keeps by default.
        torch._dynamo.config.recompile_limit = 64
        for block in self.blocks:
            block.compile(backend=backend)
