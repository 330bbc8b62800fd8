"""The model card of an export, and the upload to the hub."""

import html
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from nft.export.lora import LORA_NAME, default_title, reward_text
from nft.export.trained import Trained
from nft.objectives import objective_class
from stitchvm_reward.errors import InputError
from stitchvm_reward.hub import is_hub_id
from stitchvm_reward.runs.recipe import dump
from stitchvm_reward.runs.tracking import read_metrics
from stitchvm_reward.secrets import refuse_secrets, refuse_secrets_in

FORMATS = ("comfyui", "peft", "merged")
OUR_TAG = "stitch-nft"
PICTURES = {"curves.png": "Measures over the run", "before_after.png": "Held-out images before and after the run"}
LAYOUTS = {
    "comfyui": "in the layout that ComfyUI and diffusers read",
    "peft": "in PEFT's own layout",
    "merged": "merged into the whole transformer",
}
LOADING = {
    "comfyui": f'pipeline.load_lora_weights("FOLDER", weight_name="{LORA_NAME}")',
    "peft": 'pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, "FOLDER")',
    "merged": 'transformer = TRANSFORMER.from_pretrained("FOLDER", subfolder="transformer", dtype=dtype)',
}


@dataclass(frozen=True)
class Texts:
    """What only the user knows about an export; None: taken from the run. `address` is where others will find it."""

    title: str | None = None
    license: str | None = None
    author: str | None = None
    address: str = "THIS_FOLDER"


def escaped(text: str) -> str:
    """Return a text of the user's or of a recipe's as one line of Markdown that shows it: no markup, link or HTML."""
    line = html.escape(" ".join(text.split()), quote=False)
    # An underscore within a word is no markup; & and ; are those of html.escape.
    return re.sub(r"[\\`*\[\]{}|~#!:@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", line)


def _fenced(kind: str, lines: list[str]) -> list[str]:
    """Return a block of code that no line of its content ends."""
    ticks = max((len(run) for run in re.findall("`+", "\n".join(lines))), default=0)
    fence = "`" * max(3, ticks + 1)
    return [f"{fence}{kind}", *lines, fence]


def base_name(trained: Trained) -> str | None:
    """Return the hub id of the base: the recipe's own, or the published model of its shape."""
    path = trained.recipe.model.path
    return path if is_hub_id(path) else trained.published


def _front_matter(trained: Trained, texts: Texts) -> ModelCardData:
    base = base_name(trained)
    published = trained.published
    licence: dict[str, Any] = {"license": texts.license} if texts.license else {}
    if not licence and published is not None:
        name = trained.family.published[published].license_name
        link = f"https://huggingface.co/{published}/blob/main/LICENSE.md"
        licence = {"license": "other", "license_name": name, "license_link": link}
    return ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "text-to-image", trained.family.tag, OUR_TAG],
        **licence,
    )


def held_out_lines(trained: Trained) -> list[str]:
    """Return a Markdown table of held-out measures before training and at the checkpoint; empty without measures."""
    rows = [row for row in read_metrics(trained.folder) if "held_out/total" in row and row["epoch"] <= trained.epoch]
    if len(rows) < 2:
        return []
    first, last = rows[0], rows[-1]
    recipe = trained.recipe
    lines = [
        "## Held out",
        "",
        f"{recipe.evaluation.samples} prompts that were not trained on, one image each from fixed noise, "
        f"{recipe.evaluation.steps} Euler steps {_guidance_text(trained)}; averaged (ema) weights.",
        "",
        f"| measure | epoch {first['epoch']} | epoch {last['epoch']} | change | spread before, after |",
        "|---|---|---|---|---|",
    ]
    for key in (key for key in last if key.startswith("held_out/") and not key.endswith("_std")):
        if key in first:
            spreads = f"{first[f'{key}_std']:.3f}, {last[f'{key}_std']:.3f}"
            change = last[key] - first[key]
            lines.append(f"| {escaped(key[9:])} | {first[key]:.3f} | {last[key]:.3f} | {change:+.3f} | {spreads} |")
    return [*lines, ""]


def _guidance_text(trained: Trained) -> str:
    """Say which guidance the model was trained and measured with."""
    if trained.family.embeds_guidance(trained.config):
        return f"with the embedded guidance scale {trained.guidance:g}"
    return "without guidance"


def _use_lines(trained: Trained, kind: str, address: str) -> list[str]:
    """Return how to sample with the export, in diffusers and in ComfyUI."""
    model = trained.recipe.model
    length = "" if model.text_length == trained.family.text_length else f", max_sequence_length={model.text_length}"
    steps, side = trained.recipe.evaluation.steps, model.resolution
    base = json.dumps(base_name(trained) or model.path, ensure_ascii=False)
    place = "" if model.dtype == "float32" else '.to("cuda")'
    pipeline, transformer = trained.family.pipeline.__name__, trained.family.transformer.__name__
    load = f"pipeline = {pipeline}.from_pretrained({base}, dtype=dtype){place}"
    adapted = LOADING[kind].replace("FOLDER", address).replace("TRANSFORMER", transformer)
    if kind == "merged":
        body = [adapted, load.replace(", dtype", ", transformer=transformer, dtype")]
    else:
        body = [load, adapted]
    imports = f"{pipeline}, {transformer}" if kind == "merged" else pipeline
    lines = [
        "## Use",
        "",
        f"It was trained and measured {_guidance_text(trained)} at {side} px: keep `guidance_scale` at "
        f"{trained.guidance:g}.",
        "",
        *_fenced(
            "python",
            [
                "import torch",
                f"from diffusers import {imports}",
                *(["from peft import PeftModel"] if kind == "peft" else []),
                "",
                f"dtype = torch.{model.dtype}",
                *body,
                f'image = pipeline("PROMPT", guidance_scale={trained.guidance}, num_inference_steps={steps}, '
                f"height={side}, width={side}{length}).images[0]",
            ],
        ),
        "",
    ]
    if kind == "comfyui":
        published = trained.published
        workflow = trained.family.published[published].comfyui_workflow if published else None
        lines += [
            f"ComfyUI: put `{LORA_NAME}` into `models/loras` and load it with LoraLoaderModelOnly at strength 1"
            + (f"; `{workflow}` of stitch-nft is a workflow for it." if workflow else "."),
            "",
        ]
    elif kind == "peft":
        lines += ["This is PEFT's own layout. ComfyUI would load it at the wrong strength: export comfyui for it.", ""]
    return lines


def write_card(folder: Path, trained: Trained, texts: Texts, *, kind: str, dtype: str, deviation: float) -> None:
    """Write README.md into an export's folder, with copies of the run's curves and images."""
    recipe, difference = trained.recipe, "nothing" if deviation == 0 else f"{deviation:.1e} of their size"
    copied = [name for name in PICTURES if (trained.folder / name).is_file()]
    for name in copied:
        shutil.copyfile(trained.folder / name, folder / name)
    method = objective_class(recipe.train.objective).method
    body = [
        f"# {escaped(texts.title or default_title(recipe))}",
        "",
        f"LoRA adapters of {escaped(base_name(trained) or recipe.model.path)} by {method}, trained with stitch-nft; "
        f"{LAYOUTS[kind]}.",
        "",
        f"- reward: {escaped(reward_text(recipe))}",
        f"- adapters: rank {recipe.lora.rank}, alpha {recipe.lora.alpha}, {len(trained.scaling)} layers "
        f"({escaped(', '.join(recipe.lora.targets or trained.family.lora_targets))})",
        f"- weights: {trained.weights} of epoch {trained.epoch} ({trained.step} optimizer steps), in {dtype}; read "
        f"back, the deltas deviate from the trained ones by {difference}",
        *([f"- author: {escaped(texts.author)}"] if texts.author else []),
        "",
        *held_out_lines(trained),
        *(line for name in copied for line in (f"![{PICTURES[name]}]({name})", "")),
        *_use_lines(trained, kind, texts.address),
        "## Recipe",
        "",
        *_fenced("yaml", dump(recipe).rstrip().splitlines()),
    ]
    text = f"---\n{_front_matter(trained, texts).to_yaml()}\n---\n\n" + "\n".join(body) + "\n"
    refuse_secrets(text, "a model card")
    ModelCard(text).save(folder / "README.md")


def is_our_card(path: Path) -> bool:
    """Return whether a README.md is the card of an export that this code wrote."""
    try:
        tags = ModelCard.load(path).data.tags if path.is_file() else None
    except (OSError, ValueError):
        return False
    return OUR_TAG in (tags or [])


def check_login(repository: str) -> None:
    """Raise InputError unless `repository` is written user/name and there is a token for the hub."""
    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(f"--push is written user/name, got {repository!r}")
    if get_token() is None:
        raise InputError("--push needs a login to the hub: run `hf auth login` first, or set HF_TOKEN")


def push(folder: Path, repository: str, public: bool = False) -> str:
    """Upload an export's folder to a repository on the hub, created if necessary, and return the address.

    A new repository is private unless `public`. Raises InputError where a file contains a secret, or the hub refuses
    or cannot be reached.
    """
    refuse_secrets_in(folder, {"the login to the hub": token} if (token := get_token()) else {})
    api = HfApi()
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="LoRA adapters, trained with stitch-nft"
        )
    except Exception as error:  # a connection may fail in any way; the written files are kept
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} is written but was not uploaded to {repository}: {message}") from None
    return str(address)
