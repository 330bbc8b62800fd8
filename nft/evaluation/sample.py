"""Pictures from a pipeline as its users run it, base and tuned from the same noise."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nft.export.lora import attach_lora, lora_layers, read_header
from nft.prompts import READERS, read_prompts
from stitchvm_reward.diffusion.generator import TEXT_PARTS, Generator, decode, load_vae
from stitchvm_reward.errors import InputError
from stitchvm_reward.hub import locate
from stitchvm_reward.runs import randomness
from stitchvm_reward.steering.build import load_value, steer
from stitchvm_reward.steering.sampling import T5_LENGTH
from stitchvm_reward.steering.settings import BestOfN, SteeringRecipe


def gather_prompts(given: list[str]) -> list[str]:
    """Prompts from a command line: what ends like a prompt file is read as one, anything else is a prompt itself.

    Raises InputError for a file that is missing or cannot be read, or an empty prompt.
    """
    prompts: list[str] = []
    for item in given:
        if Path(item).suffix in READERS or os.path.isfile(item):  # a long prompt is no path that Path can look up
            prompts += read_prompts(item, "text", "train")
        elif item.strip():
            prompts.append(item)
        else:
            raise InputError("--prompts holds an empty prompt; give texts or prompt files")
    return prompts


class Sampler:
    """A Stable Diffusion 3 pipeline and, beside it, the same with a LoRA file. The autoencoder runs in float32.

    `resolution` is the side of the images in pixels: by default the one that the LoRA file was trained at, or else
    the model's own.
    """

    def __init__(
        self, model: str, lora: Path | None, dtype: torch.dtype, device: torch.device, resolution: int | None = None
    ):
        """Load everything. Raises InputError where the model or the file is missing, or they do not fit together."""
        side = ""
        if lora is not None:
            lora_layers(lora)  # a file that will not do is told before the model is loaded
            side = read_header(lora).get("modelspec.resolution", "").partition("x")[0]
        folder = locate(model, tuple(f"{part}/*" for part in ("transformer", "vae", "scheduler", *TEXT_PARTS)))
        try:
            self.pipeline = StableDiffusion3Pipeline.from_pretrained(
                folder, vae=load_vae(model, device), dtype=dtype, use_safetensors=True, local_files_only=True
            ).to(device)
        except (OSError, ValueError) as error:
            told = str(error).splitlines()[0]
            raise InputError(f"{model} is no Stable Diffusion 3 pipeline folder: {told}") from None
        self.pipeline.set_progress_bar_config(disable=True)
        self.tuned = lora is not None
        self.layers = len(attach_lora(self.pipeline, lora)) if lora is not None else 0
        own = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        self.resolution = resolution or (int(side) if side.isdigit() else own)
        self.dtype, self.device = dtype, device
        self.text_length = min(T5_LENGTH, self.pipeline.tokenizer_3.model_max_length)

    @property
    def names(self) -> list[str]:
        return ["base", "tuned"] if self.tuned else ["base"]

    @torch.no_grad()
    def images(
        self,
        prompts: list[str],
        indices: list[int],
        seed: int,
        steps: int,
        guidance: float = 1.0,
        stepped: Callable[[], object] = lambda: None,
    ) -> dict[str, Tensor]:
        """Images (batch, 3, resolution, resolution), float32 in [0, 1], of a batch of prompts: `base`, and `tuned`
        where there is a LoRA file, from the same noise.

        The noise belongs to (seed, index): no other prompt and no batch size changes a picture. `stepped` is called
        after every step of the solver.
        """
        side = self.resolution // self.pipeline.vae_scale_factor
        shape = (self.pipeline.transformer.config.in_channels, side, side)
        noise = randomness.noise(shape, seed, randomness.EVALUATION, 0, indices).to(self.device, self.dtype)

        def at_step_end(pipeline, step, level, state):
            stepped()
            return state

        found = {}
        for name in self.names:
            if self.tuned:
                (self.pipeline.enable_lora if name == "tuned" else self.pipeline.disable_lora)()
            latents = self.pipeline(
                prompts,
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=self.resolution,
                width=self.resolution,
                latents=noise,
                max_sequence_length=self.text_length,
                output_type="latent",
                callback_on_step_end=at_step_end,
            ).images
            found[name] = decode(self.pipeline.vae, latents).cpu()
        return found


def sample_all(
    sampler: Sampler, prompts: list[str], batch: int, seed: int, steps: int, guidance: float = 1.0
) -> dict[str, Tensor]:
    """Images (count, 3, h, w) of all prompts by name, as `Sampler.images` of at most `batch` at once, under a bar."""
    starts = range(0, len(prompts), batch)
    parts: dict[str, list[Tensor]] = {name: [] for name in sampler.names}
    with tqdm(total=len(starts) * steps * len(parts), desc="sample", leave=False, dynamic_ncols=True) as bar:
        for start in starts:
            indices = list(range(start, min(start + batch, len(prompts))))
            texts = [prompts[index] for index in indices]
            for name, images in sampler.images(texts, indices, seed, steps, guidance, bar.update).items():
                parts[name].append(images)
    return {name: torch.cat(images) for name, images in parts.items()}


def steer_all(
    sampler: Sampler, prompts: list[str], method: str, recipe: SteeringRecipe
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Images (count, 3, h, w) of all prompts, `plain` and `steered` from the same noise, and each prompt's trace.

    Of a model with a LoRA file both are the tuned model's; value models then run on blocks of their own. Raises
    InputError where the recipe and the model do not fit together.
    """
    pipeline, side = sampler.pipeline, sampler.resolution
    generator = Generator(pipeline.transformer, pipeline.vae, pipeline.scheduler.config.shift, side)
    value = load_value(recipe, generator, shared=not sampler.tuned)
    plain = replace(recipe, best_of_n=BestOfN(particles=1))
    found = {
        name: steer(pipeline, prompts, own, value, settings, resolution=side, text_length=sampler.text_length)
        for name, own, settings in (("plain", "best_of_n", plain), ("steered", method, recipe))
    }
    return {name: pictures.images for name, pictures in found.items()}, found["steered"].trace


def write_pictures(images: dict[str, Tensor], folder: Path) -> None:
    """Write every image as FOLDER/INDEX-NAME.png, in its own size."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, batch in images.items():
        for index, image in enumerate(batch):
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{index:04d}-{name}.png")
