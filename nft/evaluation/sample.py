"""Pictures from a diffusers pipeline as its users run it, base and tuned from the same noise."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nft.export.lora import attach_lora, lora_layers, read_header
from stitchvm_reward.diffusion.generator import Generator, load_vae
from stitchvm_reward.diffusion.prompt_cache import require_text_parts
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import family_of
from stitchvm_reward.families.family import PipelineSettings
from stitchvm_reward.files import staged
from stitchvm_reward.hub import locate
from stitchvm_reward.prompts import READERS, read_prompts
from stitchvm_reward.runs import randomness
from stitchvm_reward.steering.build import default_text_length, load_value, steer
from stitchvm_reward.steering.settings import BestOfN, SteeringRecipe


def gather_prompts(given: list[str]) -> list[str]:
    """Return prompts from a command line: an item with the ending of a prompt file is read, any other is a prompt.

    Raises InputError for a file that is missing or cannot be read, or an empty prompt.
    """
    prompts: list[str] = []
    for item in given:
        if Path(item).suffix in READERS or os.path.isfile(item):  # a long prompt is not a path that Path can look up
            prompts += read_prompts(item, "text", "train")
        elif item.strip():
            prompts.append(item)
        else:
            raise InputError("--prompts contains an empty prompt; give texts or prompt files")
    return prompts


class Sampler:
    """A pipeline and, beside it, the same pipeline with a LoRA file. The autoencoder runs in float32.

    `resolution` is the side of the images in pixels: by default the one that the LoRA file was trained at, or else the
    model's own. `guidance` is the default guidance scale.
    """

    def __init__(
        self, model: str, lora: Path | None, dtype: torch.dtype, device: torch.device, resolution: int | None = None
    ):
        """Load everything. Raises InputError where the model or the file is missing, or they do not fit together."""
        side = ""
        if lora is not None:
            lora_layers(lora)  # a file that cannot be used is reported before the model is loaded
            side = read_header(lora).get("modelspec.resolution", "").partition("x")[0]
        self.family = family_of(model)
        folder = locate(
            model, tuple(f"{part}/*" for part in ("transformer", "vae", "scheduler", *self.family.text_parts))
        )
        vae = load_vae(model, device)
        require_text_parts(self.family, folder)
        try:
            self.pipeline = self.family.pipeline.from_pretrained(
                folder, vae=vae, dtype=dtype, use_safetensors=True, local_files_only=True
            ).to(device)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{model} is not a complete {self.family.name} pipeline folder: {reason}") from None
        self.pipeline.set_progress_bar_config(disable=True)
        self.tuned = lora is not None
        self.layers = len(attach_lora(self.pipeline, lora)) if lora is not None else 0
        default = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        self.resolution = resolution or (int(side) if side.isdigit() else default)
        self.dtype, self.device = dtype, device
        self.text_length = default_text_length(self.family, self.pipeline)
        distilled = self.family.embeds_guidance(self.pipeline.transformer.config)
        self.guidance = float(self.family.guidance or 1.0) if distilled else 1.0

    @property
    def names(self) -> list[str]:
        """The columns of a grid."""
        return ["base", "tuned"] if self.tuned else ["base"]

    @torch.no_grad()
    def images(
        self,
        prompts: list[str],
        indices: list[int],
        *,
        seed: int,
        steps: int,
        guidance: float | None = None,
        on_step: Callable[[], object] = lambda: None,
    ) -> dict[str, Tensor]:
        """Return images (batch, 3, resolution, resolution), float32 in [0, 1], of a batch of prompts.

        They are `base` and, where there is a LoRA file, `tuned`, from the same noise. It belongs to (seed, index):
        no other prompt and no batch size changes a picture. `on_step` is called after every step of the solver.
        """
        side = self.resolution // self.pipeline.vae_scale_factor
        shape = (self.pipeline.vae.config.latent_channels, side, side)
        noise = randomness.noise(shape, seed, randomness.EVALUATION, 0, indices).to(self.device, self.dtype)
        scale = self.guidance if guidance is None else guidance
        settings = PipelineSettings(steps, scale, self.resolution, self.text_length, on_step)
        images = {}
        for name in self.names:
            if self.tuned:
                (self.pipeline.enable_lora if name == "tuned" else self.pipeline.disable_lora)()
            latents = self.family.sample(self.pipeline, prompts, noise, settings)
            images[name] = self.family.decode_latents(self.pipeline.vae, latents).cpu()
        return images


def sample_all(
    sampler: Sampler, prompts: list[str], batch: int, *, seed: int, steps: int, guidance: float | None = None
) -> dict[str, Tensor]:
    """Return images (count, 3, h, w) of all prompts by name, at most `batch` at once; see `Sampler.images`."""
    starts = range(0, len(prompts), batch)
    parts: dict[str, list[Tensor]] = {name: [] for name in sampler.names}
    with tqdm(total=len(starts) * steps * len(parts), desc="sample", leave=False, dynamic_ncols=True) as bar:
        for start in starts:
            indices = list(range(start, min(start + batch, len(prompts))))
            texts = [prompts[index] for index in indices]
            batch_images = sampler.images(texts, indices, seed=seed, steps=steps, guidance=guidance, on_step=bar.update)
            for name, images in batch_images.items():
                parts[name].append(images)
    return {name: torch.cat(images) for name, images in parts.items()}


def steer_all(
    sampler: Sampler, prompts: list[str], method: str, recipe: SteeringRecipe
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return images (count, 3, h, w) of all prompts, `plain` and `steered`, and the trace of each prompt.

    Both start from the same noise. With a LoRA file both are the tuned model's, and value models run on blocks of their
    own. Raises InputError where the recipe and the model do not fit together.
    """
    pipeline, side = sampler.pipeline, sampler.resolution
    generator = Generator.of_pipeline(pipeline, side, recipe.guidance)
    value = load_value(recipe, generator, shared=not sampler.tuned)
    plain = replace(recipe, best_of_n=BestOfN(particles=1))
    pictures = {
        name: steer(pipeline, prompts, arm_method, value, settings, resolution=side, text_length=sampler.text_length)
        for name, arm_method, settings in (("plain", "best_of_n", plain), ("steered", method, recipe))
    }
    return {name: result.images for name, result in pictures.items()}, pictures["steered"].trace


def write_pictures(images: dict[str, Tensor], folder: Path) -> None:
    """Write every image as FOLDER/INDEX-NAME.png, in its own size. Raises OSError if that fails."""
    for name, batch in images.items():
        for index, image in enumerate(batch):
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            with staged(folder / f"{index:04d}-{name}.png") as file:
                Image.fromarray(pixels).save(file, "PNG")
