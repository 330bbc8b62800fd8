"""Stand-ins for what a run downloads or has built: configurations as published, weights without values."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from transformers import CLIPConfig, PreTrainedModel

from nft.config import Recipe
from nft.preflight import builder_of
from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.families import architecture_of
from stitchvm_reward.families.family import Architecture
from stitchvm_reward.rewards.aesthetic import AestheticHead
from stitchvm_reward.rewards.architectures import clip_configuration
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.stitching import value_model
from stitchvm_reward.stitching.benchmark import BLOCK, REWARD_BLOCK
from stitchvm_reward.stitching.config import load_stitch_recipe
from tests.fake_cuda.mode import plausible
from tests.tiny import ROOT

COMMIT = "0" * 40
EMBEDDING = 768  # width that the published aesthetic head reads


class Hub:
    """A cache folder of the hub's layout, with configurations, tokenizers of the miniature, and no weights."""

    def __init__(self, cache: Path):
        self.cache = cache

    def folder(self, name: str) -> Path:
        """Return the folder of a model's only commit, which is made at first."""
        model = self.cache / f"models--{name.replace('/', '--')}"
        folder = model / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(COMMIT)
        return folder

    def write(self, name: str, path: str, content: Any) -> None:
        file = self.folder(name) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))

    def add_generator(self, architecture: Architecture) -> None:
        """Add a pipeline. The miniature's tokenizers read as many tokens as the published ones."""
        name, family = architecture.name, architecture.family
        index = {"_class_name": family.pipeline.__name__, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
        texts = [part for part in family.text_parts if part.startswith("text_encoder")]
        modules = []
        with torch.device("meta"):
            modules = [module for module, _ in family.text_modules(architecture, 1)]
        for part, module in zip(texts, modules, strict=True):
            index[part] = ["transformers", type(module).__name__]
            config = module.config.to_dict() | {"architectures": [type(module).__name__]}
            self.write(name, f"{part}/config.json", config)
            is_clip = config["model_type"].startswith("clip")
            tokenizer = part.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", "CLIPTokenizer" if is_clip else "T5Tokenizer"]
            source = ROOT / "miniature/weights/sd3" / ("tokenizer" if is_clip else "tokenizer_3")
            shutil.copytree(source, self.folder(name) / tokenizer, dirs_exist_ok=True)
            settings = json.loads((source / "tokenizer_config.json").read_text())
            settings["model_max_length"] = architecture.clip_tokens if is_clip else 512
            self.write(name, f"{tokenizer}/tokenizer_config.json", settings)
        self.write(name, "model_index.json", index)
        self.write(name, "transformer/config.json", dict(architecture.transformer))
        self.write(name, "vae/config.json", dict(architecture.vae))
        self.write(name, "scheduler/scheduler_config.json", dict(architecture.scheduler))

    def add_clip(self, name: str) -> None:
        """Add a CLIP model."""
        self.write(name, "config.json", CLIPConfig(**clip_configuration(name)).to_dict())
        (self.folder(name) / "model.safetensors").touch()
        for file in (ROOT / "miniature/weights/clip").glob("tokenizer*"):
            shutil.copy(file, self.folder(name))

    def add_head(self, name: str) -> None:
        """Add the aesthetic head; it is small and has real weights."""
        save_file(AestheticHead(EMBEDDING).state_dict(), self.folder(name) / "model.safetensors")

    def add_reward(self, kind: str, model: str, head: str) -> None:
        """Add what a reward of images loads."""
        self.add_clip(model)
        if head:
            self.add_head(head)


def add_value_model(hub: Hub, reward: RewardRecipe, architecture: Architecture, folder: Path) -> None:
    """Write the configuration of the value model that the recipe in recipes/stitch would build.

    Blocks that only a search finds are those that benchmarks assume.
    """
    builder = builder_of(Path(reward.value_model))
    assert builder is not None, f"no recipe builds {reward.value_model}"
    recipe, family = load_stitch_recipe(builder), architecture.family
    hub.add_reward(recipe.reward.kind, recipe.reward.model, recipe.reward.head)
    clip = CLIPConfig(**clip_configuration(recipe.reward.model))
    block, signature = recipe.backbone.block or BLOCK, plausible((16,), torch.float32).tolist()
    config = {
        "format": value_model.FORMAT,
        "dtype": "bfloat16",
        "resolution": recipe.model.resolution,
        "latent_shape": list(architecture.latent_shape(recipe.model.resolution)),
        "vae": {
            "channels": architecture.vae["latent_channels"],
            "scaling": architecture.vae["scaling_factor"],
            "shift": architecture.vae["shift_factor"],
            "weights": signature,
        },
        "backbone": {
            "path": recipe.model.path,
            "dtype": recipe.model.dtype,
            "resolution": recipe.model.resolution,
            "text_length": recipe.model.text_length,
            "guidance": family.guidance if family.embeds_guidance(architecture.transformer) else None,
            "block": block,
            "conditioning": recipe.backbone.conditioning,
            "signature": signature * (block + 1),
        },
        "reward": {
            "kind": recipe.reward.kind,
            "path": recipe.reward.model,
            "head": recipe.reward.head,
            "block": recipe.reward.block or REWARD_BLOCK,
            "vision": clip.vision_config.to_dict(),
            "projection": clip.projection_dim,
        },
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


def _value_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return a value model's tensors: on the meta device, but for the small head."""
    config = value_model.read_config(path.parent)
    architecture = architecture_of(config["backbone"]["path"])
    with torch.device("meta"):
        transformer = architecture.family.transformer.from_config(dict(architecture.transformer))
        null = architecture.family.stand_in(architecture, 1, config["backbone"]["text_length"])
    network = value_model.empty_network(config, BackboneHead(architecture.family, transformer))
    tensors = {f"network.{name}": tensor.bfloat16() for name, tensor in network.state_dict().items()}
    tensors |= {f"null.{name}": tensor.bfloat16() for name, tensor in null.tensors.items()}
    return tensors | {f"head.{name}": tensor for name, tensor in AestheticHead(EMBEDDING).state_dict().items()}


@classmethod  # type: ignore[misc]
def _diffusers_model(cls, folder: Any, *, subfolder: str, dtype: torch.dtype = torch.float32, **_: Any) -> Any:
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder, subfolder=subfolder)).to(dtype).eval()


@classmethod  # type: ignore[misc]
def _transformers_model(cls, folder: Any, *_: Any, dtype: torch.dtype = torch.float32, **__: Any) -> Any:
    with torch.device("meta"):
        return cls(cls.config_class.from_pretrained(folder)).to(dtype).eval()


def install() -> None:
    """Let models be loaded from their configurations, with weights on the meta device."""
    ModelMixin.from_pretrained = _diffusers_model
    PreTrainedModel.from_pretrained = _transformers_model
    value_model.load_file = _value_weights


def provide(recipe: Recipe, hub: Hub, folder: Path) -> None:
    """Provide all that a recipe loads; its value models move to `folder`."""
    architecture = architecture_of(recipe.model.path)
    hub.add_generator(architecture)
    for reward in recipe.rewards:
        if reward.kind == "value":
            place = folder / reward.name / "value_model"
            add_value_model(hub, reward, architecture, place)
            reward.value_model = str(place)
        else:
            hub.add_reward(reward.kind, reward.model, reward.head)
