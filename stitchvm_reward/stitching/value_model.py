"""The product: a value model of noisy latents, as one folder (Stitched Value Model, arXiv 2605.19804, section 4.1)."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from stitchvm_reward.diffusion.backbone import BackboneHead, HalfPass, load_backbone
from stitchvm_reward.diffusion.generator import Conditions, Generator
from stitchvm_reward.errors import InputError
from stitchvm_reward.files import staged
from stitchvm_reward.rewards.aesthetic import AestheticHead
from stitchvm_reward.rewards.clip import TEXT_KINDS, TextTower, load_clip
from stitchvm_reward.rewards.tail import RewardTail
from stitchvm_reward.stitching.layer import StitchingLayer

FORMAT = 1
WEIGHTS = "model.safetensors"
TOLERANCE = 0.02  # a weight read back through bfloat16 is off by up to 1/256 of itself


class ValueNetwork(nn.Module):
    """What is trained: the stitching layer and the reward's last blocks, from backbone features to an embedding."""

    def __init__(self, width_in: int, tail: RewardTail):
        super().__init__()
        self.stitch = StitchingLayer(width_in, tail.width, tail.side)
        self.tail = tail

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Last states and normalised embeddings, as `RewardTail` gives them."""
        return self.tail(self.stitch(features))


def vae_identity(vae: Any) -> dict[str, Any]:
    """What tells one latent space from another."""
    weight = vae.decoder.conv_in.weight.detach().flatten()[:16].float().cpu()
    return {
        "channels": int(vae.config.latent_channels),
        "scaling": float(vae.config.scaling_factor),
        "shift": float(vae.config.shift_factor or 0.0),
        "weights": [float(value) for value in weight],
    }


def _alike(first: list[float], second: list[float]) -> bool:
    if len(first) != len(second):
        return False
    a, b = torch.tensor(first), torch.tensor(second)
    return bool(torch.allclose(a, b, rtol=TOLERANCE, atol=1e-4))


class StitchedValueModel:
    """V(z_t) = tail(stitch(head(z_t))): the expected reward of what a noisy latent becomes.

    `backbone` is shared, not owned; `null` holds what its blocks read of the empty prompt. `config` is what the
    folder's config.json says.
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

    def features(self, latents: Tensor, sigma: Tensor, conditions: Conditions | None = None) -> Tensor:
        """The backbone's features that this model reads, (batch, width, h, w)."""
        own = self._conditions(len(latents), conditions)
        return self.backbone.features(latents, sigma, own, [self.block])[self.block]

    def _conditions(self, count: int, conditions: Conditions | None) -> Conditions:
        if self.conditioning == "prompt":
            if conditions is None:
                raise InputError("this value model's backbone reads the prompt: score needs the prompts' conditions")
            return conditions
        return self.null.expand(count)

    def value(self, features: Tensor, prompts: list[str] | None) -> Tensor:
        """(batch,) float32 of the backbone's features."""
        embedding = self.network(features)[1]
        if isinstance(self.readout, TextTower):
            if prompts is None:
                raise InputError("this value model scores an image against its text: score needs the prompts")
            return self.readout.score(embedding, prompts)
        return self.readout(embedding)

    def score(
        self,
        latents: Tensor,
        sigma: Tensor | float,
        prompts: list[str] | None = None,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """(batch,) float32 in the reward's own units; differentiable in the latents.

        `latents` (batch, channels, h, w) at levels `sigma` in [0, 1], one number or (batch,). `prompts` are needed
        where the reward reads text, `conditions` where the backbone does. Raises InputError for latents of another
        shape, or where either is missing.
        """
        check_latents(self, latents)
        return self.value(self.features(latents, levels(sigma, latents), conditions), prompts)

    def require_fit(self, generator: Generator) -> None:
        """Raise InputError unless the model is for this generator's autoencoder and image size."""
        if generator.resolution != self.config["resolution"]:
            raise InputError(
                f"the value model is for {self.config['resolution']} px, the generator makes "
                f"{generator.resolution} px; stitch one for this size or set model.resolution"
            )
        ours, theirs = self.config["vae"], vae_identity(generator.vae)
        same = ours["channels"] == theirs["channels"] and _alike(ours["weights"], theirs["weights"])
        if not same or abs(ours["scaling"] - theirs["scaling"]) > 1e-6 or abs(ours["shift"] - theirs["shift"]) > 1e-6:
            raise InputError(
                "the value model was stitched to another autoencoder's latents; use the generator it was made for "
                f"({self.config['backbone']['path']}) or one that shares its autoencoder"
            )

    def save(self, folder: Path) -> None:
        """Write the folder: model.safetensors and config.json; whole or not at all."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {"null.tokens": self.null.tokens, "null.pooled": self.null.pooled}
        if isinstance(self.readout, AestheticHead):
            tensors |= {f"head.{name}": tensor for name, tensor in self.readout.state_dict().items()}
        dtype = getattr(torch, self.config["dtype"])
        with staged(folder) as new:
            new.mkdir()
            save_file({n: t.detach().to(dtype).cpu().contiguous() for n, t in tensors.items()}, new / WEIGHTS)
            (new / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        backbone: BackboneHead | None = None,
        backbone_dtype: torch.dtype | None = None,
    ) -> "StitchedValueModel":
        """Load a value model. Of its backbone only the blocks it runs are loaded, and none where `backbone` is given.

        Raises InputError where the folder is no value model, or `backbone` is not the network it was stitched to.
        """
        folder, device = Path(folder).expanduser(), torch.device(device)
        config = read_config(folder)
        own = config["backbone"]
        if backbone is None:
            dtype = backbone_dtype or getattr(torch, own["dtype"])
            backbone = load_backbone(own["path"], own["block"], dtype, device)
        if not is_stitched_to(own, backbone):
            raise InputError(f"{folder} was stitched to another backbone ({own['path']}); give that one")
        try:
            tensors = load_file(folder / WEIGHTS)
            network = empty_network(config, backbone)
            parts = {name.removeprefix("network."): t.float() for name, t in tensors.items() if "network." in name}
            network.load_state_dict(parts, assign=True)
            null = Conditions(
                tensors["null.tokens"].to(device, backbone.dtype), tensors["null.pooled"].to(device, backbone.dtype)
            )
            head = {name.removeprefix("head."): t.float() for name, t in tensors.items() if name.startswith("head.")}
            readout = _readout(config, head, device)
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None
        return cls(backbone, network.to(device).eval().requires_grad_(False), readout, null, config)


def empty_network(config: dict[str, Any], backbone: BackboneHead) -> ValueNetwork:
    """The network of a value model without its weights, on the meta device."""
    vision = CLIPVisionConfig(**config["reward"]["vision"])
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), projection_dim=config["reward"]["projection"]))
        return ValueNetwork(backbone.width(config["backbone"]["block"]), RewardTail(clip, config["reward"]["block"]))


def _readout(config: dict[str, Any], head: dict[str, Tensor], device: torch.device) -> AestheticHead | TextTower:
    if config["reward"]["kind"] in TEXT_KINDS:
        clip, folder = load_clip(config["reward"]["path"], device)
        clip.vision_model = nn.Identity()  # only the text is read
        return TextTower(clip, folder, config["reward"]["kind"])
    readout = AestheticHead(head["layers.0.weight"].shape[1])
    readout.load_state_dict(head)
    return readout.to(device).eval().requires_grad_(False)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a value model. Raises InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"value model not found: {folder}; build one with launch/stitch.py")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["format"] != FORMAT:
            raise InputError(f"{folder} has format {config['format']}, this version reads {FORMAT}; stitch it anew")
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is no value model: config.json is missing or damaged") from None
    return config


def load_value_models(
    folders: dict[str, str], device: torch.device | str, backbone: BackboneHead | None = None
) -> dict[str, StitchedValueModel]:
    """Load several value models; those of one backbone share its blocks, loaded once.

    Those that were stitched to `backbone` use its blocks and load none.
    """
    configs = {name: read_config(Path(folder).expanduser())["backbone"] for name, folder in folders.items()}
    deepest: dict[tuple[str, str], int] = {}
    for own in configs.values():
        deepest[own["path"], own["dtype"]] = max(deepest.get((own["path"], own["dtype"]), 0), own["block"])
    loaded: dict[tuple[str, str], BackboneHead] = {}
    models = {}
    for name, folder in folders.items():
        own, key = configs[name], (configs[name]["path"], configs[name]["dtype"])
        chosen = backbone if backbone is not None and is_stitched_to(own, backbone) else loaded.get(key)
        if chosen is None:
            chosen = load_backbone(own["path"], deepest[key], getattr(torch, own["dtype"]), torch.device(device))
            loaded[key] = chosen
        models[name] = StitchedValueModel.from_pretrained(folder, device, chosen)
    return models


def load_for(folders: dict[str, str], generator: Generator, shared: bool = True) -> dict[str, StitchedValueModel]:
    """As `load_value_models`, for a generator: on its own blocks where they are stitched to these and they may be
    `shared`. Raises InputError where one is made for another autoencoder or size."""
    models = load_value_models(folders, generator.device, BackboneHead(generator.transformer) if shared else None)
    for model in models.values():
        model.require_fit(generator)
    return models


def is_stitched_to(own: dict[str, Any], backbone: BackboneHead) -> bool:
    """Whether a value model's backbone section of config.json speaks of this network."""
    return backbone.blocks >= own["block"] and _alike(backbone.signature(own["block"]), own["signature"])


def levels(sigma: Tensor | float, latents: Tensor) -> Tensor:
    """Noise levels as (batch,) float32, from one number or one a sample."""
    return torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).expand(len(latents))


def check_latents(model: StitchedValueModel, latents: Tensor) -> None:
    """Raise InputError for latents of another shape than the model's."""
    if latents.ndim != 4 or tuple(latents.shape[1:]) != model.latent_shape:
        wanted = " x ".join(str(size) for size in model.latent_shape)
        raise InputError(f"the value model reads latents of (batch, {wanted}), got {tuple(latents.shape)}")


def score_all(
    models: dict[str, StitchedValueModel],
    latents: Tensor,
    sigma: Tensor | float,
    prompts: list[str] | None = None,
    conditions: Conditions | None = None,
) -> dict[str, Tensor]:
    """Scores of several value models by name; those on one backbone and one conditioning share a pass of its blocks."""
    return score_and_keep(models, latents, sigma, prompts, conditions)[0]


def score_and_keep(
    models: dict[str, StitchedValueModel],
    latents: Tensor,
    sigma: Tensor | float,
    prompts: list[str] | None = None,
    conditions: Conditions | None = None,
) -> tuple[dict[str, Tensor], dict[str, HalfPass]]:
    """As `score_all`, and by conditioning the backbone's pass as it stands after the blocks that were run.

    Where models of one conditioning run on several networks, the first one's pass is kept.
    """
    groups: dict[tuple, list[str]] = {}
    for name, model in models.items():
        check_latents(model, latents)
        groups.setdefault((id(model.backbone.network), model.conditioning, model.null.tokens.shape[1]), []).append(name)
    scores: dict[str, Tensor] = {}
    passes: dict[str, HalfPass] = {}
    for names in groups.values():
        first = models[names[0]]
        blocks = [models[name].block for name in names]
        own = first._conditions(len(latents), conditions)
        shared, stands = first.backbone.run(latents, levels(sigma, latents), own, blocks)
        scores |= {name: models[name].value(shared[models[name].block], prompts) for name in names}
        if stands is not None:
            passes.setdefault(first.conditioning, stands)
    return {name: scores[name] for name in models}, passes
