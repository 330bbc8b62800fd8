"""Stitched value models: a value of noisy latents, kept as one folder (arXiv 2605.19804, section 4.1)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from stitchvm_reward.diffusion.backbone import BackboneHead, load_backbone
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.errors import InputError
from stitchvm_reward.families.family import Architecture, Conditions, PartialForward
from stitchvm_reward.files import staged
from stitchvm_reward.rewards.aesthetic import AestheticHead
from stitchvm_reward.rewards.clip import TEXT_KINDS, TextTower, load_clip
from stitchvm_reward.rewards.tail import RewardTail
from stitchvm_reward.stitching.layer import StitchingLayer

FORMAT = 2
WEIGHTS = "model.safetensors"
TOLERANCE = 0.02  # a weight that was stored in bfloat16 is off by up to 1/256 of itself


class ValueNetwork(nn.Module):
    """The trained part: the stitching layer and the reward's last blocks, from backbone features to an embedding."""

    def __init__(self, width_in: int, tail: RewardTail):
        super().__init__()
        self.stitch = StitchingLayer(width_in, tail.width, tail.side)
        self.tail = tail

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last states and the normalised embeddings; see `RewardTail`."""
        return self.tail(self.stitch(features))


def _close(first: list[float], second: list[float]) -> bool:
    if len(first) != len(second):
        return False
    a, b = torch.tensor(first), torch.tensor(second)
    return bool(torch.allclose(a, b, rtol=TOLERANCE, atol=1e-4))


class StitchedValueModel:
    """V(z_t) = tail(stitch(head(z_t))): the expected reward of the image that a noisy latent becomes.

    `backbone` may be shared with other models. `null` holds the conditions of the empty prompt. `config` is the
    content of the folder's config.json.
    """

    def __init__(
        self,
        backbone: BackboneHead,
        network: ValueNetwork,
        readout: AestheticHead | TextTower,
        null: Conditions,
        config: dict[str, Any],
    ):
        self.backbone, self.network, self.readout, self.null, self.config = backbone, network, readout, null, config
        self.block: int = config["backbone"]["block"]
        self.conditioning: str = config["backbone"]["conditioning"]
        self.latent_shape = tuple(config["latent_shape"])
        self.device = backbone.device

    def to(self, device: torch.device | str) -> "StitchedValueModel":
        """Move the model to a device, with the backbone's blocks that it runs, and return it."""
        device = torch.device(device)
        self.backbone.network.to(device)
        self.network.to(device)
        self.readout.to(device)
        self.null = self.null.to(device, self.backbone.dtype)
        self.backbone.device = self.device = device
        return self

    def features(self, latents: Tensor, sigma: Tensor, conditions: Conditions | None = None) -> Tensor:
        """Return the backbone's features that this model reads, (batch, width, h, w)."""
        selected = self.select_conditions(len(latents), conditions)
        return self.backbone.features(latents, sigma, selected, [self.block])[self.block]

    def select_conditions(self, count: int, conditions: Conditions | None) -> Conditions:
        """Return the conditions that the backbone reads for `count` latents: the prompts' or the empty prompt's.

        Raises InputError where it reads the prompts' and there are none.
        """
        if self.conditioning == "prompt":
            if conditions is None:
                raise InputError("this value model's backbone reads the prompt: score needs the prompts' conditions")
            return conditions
        return self.null.expand(count)

    def value(self, features: Tensor, prompts: list[str] | None) -> Tensor:
        """Return the values (batch,) float32 of the backbone's features."""
        embedding = self.network(features)[1]
        if isinstance(self.readout, TextTower):
            if prompts is None:
                raise InputError("this value model compares an image with its text: score needs the prompts")
            return self.readout.score(embedding, prompts)
        return self.readout(embedding)

    def score(
        self,
        latents: Tensor,
        sigma: Tensor | float,
        prompts: list[str] | None = None,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Return scores (batch,) float32 in the reward's own units; differentiable in the latents.

        `latents` (batch, channels, h, w) are at levels `sigma` in [0, 1], one number or (batch,). `prompts` are
        needed if the reward reads text, `conditions` if the backbone does. Raises InputError for latents of another
        shape, or if either is missing.
        """
        check_latents(self, latents)
        return self.value(self.features(latents, levels(sigma, latents), conditions), prompts)

    def require_fit(self, generator: Generator) -> None:
        """Raise InputError unless the model fits this generator's autoencoder, image size and conditions."""
        if generator.resolution != self.config["resolution"]:
            raise InputError(
                f"the value model is for {self.config['resolution']} px, the generator makes "
                f"{generator.resolution} px; stitch one for this size or set model.resolution"
            )
        ours, theirs = self.config["vae"], generator.family.latent_space(generator.vae)
        same = ours["channels"] == theirs["channels"] and _close(ours["weights"], theirs["weights"])
        if not same or abs(ours["scaling"] - theirs["scaling"]) > 1e-6 or abs(ours["shift"] - theirs["shift"]) > 1e-6:
            raise InputError(
                "the value model was stitched to another autoencoder's latents; use the generator it was made for "
                f"({self.config['backbone']['path']}) or one that shares its autoencoder"
            )
        if self.conditioning == "prompt" and self.backbone.family is not generator.family:
            raise InputError(
                f"the value model reads prompts as {self.backbone.family.name} does, the generator is "
                f"{generator.family.name}; use a value model with backbone.conditioning=null"
            )

    def save(self, folder: Path) -> None:
        """Write the folder, whole or not at all: model.safetensors and config.json."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"null.{name}": tensor for name, tensor in self.null.tensors.items()}
        if isinstance(self.readout, AestheticHead):
            tensors |= {f"head.{name}": tensor for name, tensor in self.readout.state_dict().items()}
        dtype = getattr(torch, self.config["dtype"])
        stored = {
            name: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).cpu().contiguous()
            for name, tensor in tensors.items()
        }
        try:
            config = json.dumps(self.config, indent=2, allow_nan=False)
        except ValueError:
            raise InputError(
                f"{folder} is not written, it would hold numbers that are not finite: the weights of "
                f"{self.config['backbone']['path']} are damaged"
            ) from None
        with staged(folder) as new:
            new.mkdir()
            save_file(stored, new / WEIGHTS)
            (new / "config.json").write_text(config + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        backbone: BackboneHead | None = None,
        backbone_dtype: torch.dtype | None = None,
    ) -> "StitchedValueModel":
        """Load a value model and the backbone blocks that it runs, or run them on `backbone` where it is given.

        Raises InputError for a folder that is not a value model, and for a `backbone` that it was not stitched to.
        """
        folder, device = Path(folder).expanduser(), torch.device(device)
        config = read_config(folder)
        stitched_to = config["backbone"]
        if backbone is None:
            dtype = backbone_dtype or getattr(torch, stitched_to["dtype"])
            backbone = _load_blocks(stitched_to, stitched_to["block"], dtype, device)
        if not is_stitched_to(stitched_to, backbone):
            raise InputError(f"{folder} was stitched to another backbone ({stitched_to['path']}); give that one")
        if backbone.guidance != stitched_to["guidance"]:
            backbone = BackboneHead(backbone.family, backbone.network, backbone.blocks, stitched_to["guidance"])
        try:
            tensors = load_file(folder / WEIGHTS)
            network = empty_network(config, backbone)
            network.load_state_dict({n: t.float() for n, t in _section(tensors, "network").items()}, assign=True)
            null = Conditions(_section(tensors, "null")).to(device, backbone.dtype)
            head = {name: tensor.float() for name, tensor in _section(tensors, "head").items()}
            for name in backbone.family.condition_names:
                null[name]  # raises KeyError where it is missing
            readout = _readout(config, head, device)
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None
        return cls(backbone, network.to(device).eval().requires_grad_(False), readout, null, config)


def _section(tensors: dict[str, Tensor], section: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `section`, under the rest of their names."""
    prefix = f"{section}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load_blocks(stitched_to: dict[str, Any], blocks: int, dtype: torch.dtype, device: torch.device) -> BackboneHead:
    return load_backbone(stitched_to["path"], blocks, dtype, device, stitched_to["guidance"])


def empty_network(config: dict[str, Any], backbone: BackboneHead) -> ValueNetwork:
    """Return the network of a value model without its weights, on the meta device."""
    vision = CLIPVisionConfig(**config["reward"]["vision"])
    width = backbone.width(config["backbone"]["block"], config["latent_shape"][0])
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), projection_dim=config["reward"]["projection"]))
        return ValueNetwork(width, RewardTail(clip, config["reward"]["block"]))


def _readout(config: dict[str, Any], head: dict[str, Tensor], device: torch.device) -> AestheticHead | TextTower:
    if config["reward"]["kind"] in TEXT_KINDS:
        clip, folder = load_clip(config["reward"]["path"], device)
        clip.vision_model = nn.Identity()  # only the text tower is needed
        return TextTower(clip, folder, config["reward"]["kind"])
    readout = AestheticHead(head["layers.0.weight"].shape[1])
    readout.load_state_dict(head)
    return readout.to(device).eval().requires_grad_(False)


def depth_of(architecture: Architecture) -> int:
    """Return the number of the transformer's blocks."""
    with torch.device("meta"):
        network = architecture.family.transformer.from_config(dict(architecture.transformer))
    return len(architecture.family.blocks(network))


def check_block(architecture: Architecture, block: int | None) -> None:
    """Raise InputError for a backbone.block that the architecture does not have."""
    if (block or 0) > (depth := depth_of(architecture)):
        raise InputError(f"backbone.block must be at most {depth}, the backbone's number of blocks, got {block}")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a value model. Raises InputError where it is missing, damaged or of another format."""
    if not folder.is_dir():
        raise InputError(f"value model not found: {folder}; build one with launch/stitch.py")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["format"] != FORMAT:
            raise InputError(
                f"{folder} is a value model of format {config['format']}, this version reads format {FORMAT}; "
                "build it again with launch/stitch.py"
            )
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is not a value model: config.json is missing or damaged") from None
    return config


def load_value_models(
    folders: dict[str, str], device: torch.device | str, backbone: BackboneHead | None = None
) -> dict[str, StitchedValueModel]:
    """Load several value models by name. Models of one backbone share its blocks, which are loaded once.

    Models that were stitched to `backbone` run on its blocks, and none are loaded for them.
    """
    configs = {name: read_config(Path(folder).expanduser())["backbone"] for name, folder in folders.items()}
    deepest: dict[tuple[str, str], int] = {}
    for config in configs.values():
        key = config["path"], config["dtype"]
        deepest[key] = max(deepest.get(key, 0), config["block"])
    loaded: dict[tuple[str, str], BackboneHead] = {}
    models = {}
    for name, folder in folders.items():
        config = configs[name]
        key = config["path"], config["dtype"]
        chosen = backbone if backbone is not None and is_stitched_to(config, backbone) else loaded.get(key)
        if chosen is None:
            chosen = _load_blocks(config, deepest[key], getattr(torch, config["dtype"]), torch.device(device))
            loaded[key] = chosen
        models[name] = StitchedValueModel.from_pretrained(folder, device, chosen)
    return models


def load_for(folders: dict[str, str], generator: Generator, shared: bool = True) -> dict[str, StitchedValueModel]:
    """Load value models for a generator, on the generator's own blocks where `shared` and they were stitched to them.

    Raises InputError for a model that does not fit the generator; see `StitchedValueModel.require_fit`.
    """
    models = load_value_models(folders, generator.device, BackboneHead.of(generator) if shared else None)
    for model in models.values():
        model.require_fit(generator)
    return models


def is_stitched_to(config: dict[str, Any], backbone: BackboneHead) -> bool:
    """Return whether the backbone section of a value model's config.json describes this network."""
    return backbone.blocks >= config["block"] and _close(backbone.signature(config["block"]), config["signature"])


def levels(sigma: Tensor | float, latents: Tensor) -> Tensor:
    """Return noise levels as (batch,) float32, from one number or one per sample."""
    return torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))


def check_latents(model: StitchedValueModel, latents: Tensor) -> None:
    """Raise InputError for latents whose shape or device is not the model's."""
    if latents.ndim != 4 or tuple(latents.shape[1:]) != model.latent_shape:
        expected = " x ".join(str(size) for size in model.latent_shape)
        raise InputError(f"the value model reads latents of (batch, {expected}), got {tuple(latents.shape)}")
    if latents.device.type != model.device.type:
        raise InputError(
            f"the value model is on the {model.device.type} device, the latents are on {latents.device.type}: load it "
            "with from_pretrained(..., device=latents.device), or move it with to(latents.device)"
        )


def score_all(
    models: dict[str, StitchedValueModel],
    latents: Tensor,
    sigma: Tensor | float,
    prompts: list[str] | None = None,
    conditions: Conditions | None = None,
) -> dict[str, Tensor]:
    """Return the scores of several value models by name.

    Models that share a backbone and its conditions share one pass through its blocks.
    """
    return score_and_keep(models, latents, sigma, prompts, conditions)[0]


def score_and_keep(
    models: dict[str, StitchedValueModel],
    latents: Tensor,
    sigma: Tensor | float,
    prompts: list[str] | None = None,
    conditions: Conditions | None = None,
) -> tuple[dict[str, Tensor], dict[str, PartialForward]]:
    """Return the scores as `score_all`, and by conditioning the backbone's pass after the last block that was run.

    Where models of one conditioning need several passes, the first pass is kept.
    """
    groups: dict[tuple, list[str]] = {}
    for name, model in models.items():
        check_latents(model, latents)
        key = id(model.backbone.network), model.backbone.guidance, model.conditioning, model.null.key()
        groups.setdefault(key, []).append(name)
    scores: dict[str, Tensor] = {}
    passes: dict[str, PartialForward] = {}
    for names in groups.values():
        first = models[names[0]]
        blocks = [models[name].block for name in names]
        selected = first.select_conditions(len(latents), conditions)
        features, partial = first.backbone.run(latents, levels(sigma, latents), selected, blocks)
        scores |= {name: models[name].value(features[models[name].block], prompts) for name in names}
        if partial is not None:
            passes.setdefault(first.conditioning, partial)
    return {name: scores[name] for name in models}, passes
