"""From a recipe to a value model: targets, search, finetuning, the folder."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from stitchvm_reward.diffusion.architectures import configurations
from stitchvm_reward.diffusion.backbone import load_backbone
from stitchvm_reward.diffusion.generator import Conditions, PromptEmbeddings, encode, load_vae
from stitchvm_reward.diffusion.path import noised
from stitchvm_reward.errors import InputError
from stitchvm_reward.hub import is_hub_id, locate
from stitchvm_reward.rewards.aesthetic import load_head
from stitchvm_reward.rewards.clip import ImageTower, TextTower, require_folder
from stitchvm_reward.rewards.tail import RewardTail, vision_states
from stitchvm_reward.runs import checkpoint, randomness
from stitchvm_reward.runs.agreement import Agreement
from stitchvm_reward.runs.geometry import share
from stitchvm_reward.runs.run_folder import check_run_folder, prepare_run_folder
from stitchvm_reward.runs.tracking import Tracker, curves
from stitchvm_reward.stitching.config import StitchRecipe
from stitchvm_reward.stitching.distill import Distiller
from stitchvm_reward.stitching.images import find_images
from stitchvm_reward.stitching.search import Probe, Search, backbone_features, heat_map, search, start
from stitchvm_reward.stitching.targets import SHARD, Targets, compute, open_targets, targets_folder
from stitchvm_reward.stitching.value_model import (
    FORMAT,
    StitchedValueModel,
    ValueNetwork,
    vae_identity,
)

PROMPT_CACHE = "prompts"


def check_stitch_recipe(recipe: StitchRecipe) -> None:
    """Check everything that needs no weights. Raises InputError."""
    check_run_folder(recipe)
    transformer, _, _ = configurations(recipe.backbone.path)
    depth = int(transformer["num_layers"])
    if (recipe.backbone.block or 0) > depth:
        raise InputError(f"backbone.block must be at most {depth}, the backbone's blocks, got {recipe.backbone.block}")
    require_folder(recipe.reward.model)
    if not is_hub_id(recipe.reward.model):
        config = locate(recipe.reward.model, ()) / "config.json"
        try:
            blocks = int(json.loads(config.read_text())["vision_config"]["num_hidden_layers"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{recipe.reward.model} is no CLIP model folder: no vision_config in config.json"
            ) from None
        for name, value in (
            ("search.last_reward_block", recipe.search.last_reward_block),
            ("reward.block", recipe.reward.block or 1),
        ):
            if value > blocks:
                raise InputError(f"{name} must be at most {blocks}, the reward model's blocks, got {value}")
    if recipe.reward.head and not is_hub_id(recipe.reward.head) and not Path(recipe.reward.head).expanduser().exists():
        raise InputError(f"aesthetic head not found: {recipe.reward.head}; give a file, a folder or a hub id")
    folder = Path(recipe.data.images).expanduser()
    if folder.exists() or not is_hub_id(recipe.data.images):
        find_images(recipe.data.images, "", "", "", recipe.data.limit)


class Builder:
    """Everything that stage 1 and stage 2 share: the images, their targets, the frozen networks."""

    def __init__(self, recipe: StitchRecipe, accelerator: Accelerator):
        self.recipe, self.accelerator, self.device = recipe, accelerator, accelerator.device
        self.main = accelerator.is_main_process
        data, backbone = recipe.data, recipe.backbone
        self.images = find_images(data.images, data.split, data.column, data.captions, data.limit)
        self.dtype = getattr(torch, backbone.dtype)
        self.embeddings = PromptEmbeddings(
            backbone.path, str(Path(data.cache) / PROMPT_CACHE), backbone.t5_length, self.dtype, self.device
        )
        if self.main:
            self.embeddings.ensure([""])
        accelerator.wait_for_everyone()
        self.null = self.embeddings.conditions([""])
        self.tower = ImageTower(recipe.reward.model, recipe.reward.kind, self.device)
        self.vae_identity, self.targets = self._targets()
        if self.main and self.targets.broken:
            names = ", ".join(self.targets.broken[:5])
            tqdm.write(f"{len(self.targets.broken)} broken or empty images are left out: {names}")
        # Places among the targets: those kept out of all fitting first.
        split = randomness.at(recipe.seed, randomness.SPLIT)
        self.order: list[int] = torch.randperm(len(self.targets), generator=split).tolist()
        self.head = load_backbone(backbone.path, self._blocks_needed(), self.dtype, self.device)

    def _blocks_needed(self) -> int:
        if self.recipe.backbone.block is not None:
            return self.recipe.backbone.block
        return int(configurations(self.recipe.backbone.path)[0]["num_layers"])

    def _bar(self, items, phase: str) -> tqdm:
        return tqdm(items, desc=phase, leave=False, disable=not self.main, dynamic_ncols=True)

    def _targets(self) -> tuple[dict[str, Any], Targets]:
        """Every process computes its share of the missing targets; the autoencoder is freed after."""
        recipe = self.recipe
        vae = load_vae(recipe.backbone.path, self.device)
        identity = vae_identity(vae)
        self.latent_shape = (
            vae.config.latent_channels,
            *2 * (recipe.backbone.resolution // 2 ** (len(vae.config.block_out_channels) - 1),),
        )
        key = {
            "vae": identity,
            "reward": _digest(self.tower),
            "fit": self.tower.fit.__name__,  # kinds of reward may share a tower and show it another cut of the picture
            "side": recipe.backbone.resolution,
        }
        folder = targets_folder(recipe.data.cache, self.images, key)
        shards = range(-(-len(self.images) // SHARD))
        own = share(len(shards), self.accelerator.process_index, self.accelerator.num_processes)
        compute(
            folder,
            self.images,
            recipe.backbone.resolution,
            functools.partial(encode, vae),
            self.tower,
            recipe.finetune.micro_batch,
            self._bar(shards[own.start : own.stop], "latents and targets"),
        )
        self.accelerator.wait_for_everyone()
        del vae
        gc.collect()
        needed = recipe.data.held_out + max(recipe.finetune.batch, recipe.search.probe + recipe.search.held_out)
        return identity, open_targets(folder, self.images, needed)

    def captions(self, order: list[int]) -> Callable[[list[int]], Conditions] | None:
        """What the backbone reads of images, by their places among the targets, where it reads prompts at all."""
        if self.recipe.backbone.conditioning == "null":
            return None
        texts = {index: self.images.caption(self.targets.rows[index]) for index in order}
        if self.main:
            self.embeddings.ensure(list(texts.values()), progress=lambda items: self._bar(items, "encode captions"))
        self.accelerator.wait_for_everyone()
        return lambda indices: self.embeddings.conditions([texts[index] for index in indices])

    @torch.no_grad()
    def probe(self, blocks: list[int], reward_blocks: list[int]) -> Probe:
        """Features of the probe images, each with its own level t ~ U[0, 1] and noise; one forward of each model."""
        recipe, size = self.recipe, self.recipe.finetune.micro_batch
        count = recipe.search.probe + recipe.search.held_out
        chosen = self.order[recipe.data.held_out :][:count]
        conditions = self.captions(chosen)
        parts: tuple[dict, dict, dict] = {}, {}, {}
        grid = self.tower.clip.config.vision_config.image_size // self.tower.clip.config.vision_config.patch_size
        for begin in self._bar(range(0, len(chosen), size), "search: features"):
            indices = chosen[begin : begin + size]
            rows = [self.targets.rows[index] for index in indices]
            (latents,) = self.targets.read(indices, ("latents",))
            draws = [randomness.at(recipe.seed, randomness.PROBE, row) for row in rows]
            sigma = torch.cat([torch.rand(1, generator=g) for g in draws]).to(self.device)
            noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in draws])
            noisy = noised(latents.to(self.device), noise.to(self.device), sigma)
            own = self.null.expand(len(indices)) if conditions is None else conditions(indices)
            for i, found in backbone_features(self.head, noisy, sigma, own, blocks, grid).items():
                parts[0].setdefault(i, []).append(found)
            images = torch.stack([self._image(row) for row in rows])
            states = vision_states(self.tower.clip, self.tower.pixels(images), max(reward_blocks) - 1)
            for j in reward_blocks:
                parts[1].setdefault(j, []).append((states[0] if j == 1 else states[j - 1][:, 1:]).float().cpu())
                if j > 1:
                    parts[2].setdefault(j, []).append(states[j - 1][:, 0].float().cpu())
        backbone, reward, classes = ({key: torch.cat(found) for key, found in part.items()} for part in parts)
        return Probe(backbone, reward, classes)

    def _image(self, row: int) -> Tensor:
        image = self.images.load(row, self.recipe.backbone.resolution)
        if image is None:
            raise InputError(f"{self.images.names[row]} could be read before and cannot be read now")
        return image

    def model(self, probe: Probe, block: int, reward_block: int) -> StitchedValueModel:
        """The stitched model of a pair of blocks as the search leaves it, before finetuning."""
        recipe = self.recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(randomness.at(recipe.seed, randomness.ADAPTERS).initial_seed())
            network = ValueNetwork(self.head.width(block), RewardTail(self.tower.clip, reward_block))
        solution, class_state, offsets = start(probe, block, reward_block)
        network.stitch.set_linear(solution)
        if class_state is not None and offsets is not None:
            network.tail.set_start(class_state, offsets)
        if recipe.reward.kind == "aesthetic":
            readout: Any = load_head(recipe.reward.head).to(self.device)
        else:
            readout = TextTower(self.tower.clip, self.tower.folder, recipe.reward.kind)
        vision = self.tower.clip.config.vision_config
        config = {
            "format": FORMAT,
            "backbone": dataclasses.asdict(recipe.backbone) | {"block": block, "signature": self.head.signature(block)},
            "vae": self.vae_identity,
            "reward": {
                "kind": recipe.reward.kind,
                "path": recipe.reward.model,
                "head": recipe.reward.head,
                "block": reward_block,
                "vision": vision.to_diff_dict(),
                "projection": self.tower.clip.config.projection_dim,
            },
            "resolution": recipe.backbone.resolution,
            "latent_shape": list(self.latent_shape),
            "dtype": "float16",
            "training": {"images": recipe.data.images, "count": len(self.targets), "seed": recipe.seed}
            | dataclasses.asdict(recipe.finetune),
        }
        return StitchedValueModel(self.head, network.to(self.device), readout, self.null, config)


def _digest(tower: ImageTower) -> str:
    """Identify a reward's image tower by its activation and numbers out of its weights."""
    digest = hashlib.sha256(tower.clip.config.vision_config.hidden_act.encode())
    for _, tensor in sorted(tower.clip.vision_model.state_dict().items()):
        digest.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def run_search(builder: Builder, folder: Path | None) -> tuple[Probe, Search]:
    """Stage 1 over all blocks; writes search.json and search.png on the main process."""
    recipe = builder.recipe
    blocks = list(range(builder.head.blocks + 1))
    if recipe.backbone.block is not None:
        blocks = [recipe.backbone.block]
    probe = builder.probe(blocks, list(range(1, recipe.search.last_reward_block + 1)))
    found = search(probe, recipe.search.probe)
    if folder is not None:
        (folder / "search.json").write_text(json.dumps(found.table(), indent=1) + "\n")
        heat_map(found, folder / "search.png")
    return probe, found


def build(recipe: StitchRecipe, accelerator: Accelerator, only_search: bool = False) -> Path:
    """Search, finetune and save; returns the folder of the value model, or of the search alone."""
    check_stitch_recipe(recipe)
    builder = Builder(recipe, accelerator)
    claim = Agreement(accelerator).together(lambda: prepare_run_folder(recipe) if builder.main else None)
    with claim or contextlib.nullcontext():
        return _search_and_finetune(recipe, accelerator, builder, only_search)


def _search_and_finetune(recipe: StitchRecipe, accelerator: Accelerator, builder: Builder, only_search: bool) -> Path:
    folder = Path(recipe.out).expanduser()
    probe, found = run_search(builder, folder if builder.main else None)
    asked = recipe.backbone.block, recipe.reward.block
    block, reward_block = found.best(*(None if wanted is None else [wanted] for wanted in asked))
    if builder.main:
        tqdm.write(_search_text(found, block, reward_block))
    if only_search:
        return folder
    model = builder.model(probe, block, reward_block)
    del probe
    distiller = Distiller(recipe, accelerator, model, builder.targets, builder.order, builder.captions(builder.order))
    warn = tqdm.write if builder.main else lambda _: None
    path = checkpoint.choose(folder / "checkpoints", recipe.checkpoint.resume, warn)
    if path is not None:
        distiller.resume(path)
        warn(f"resumed from {path}")
    tracker = Tracker(folder, distiller.epoch + 1 if distiller.epoch else 0) if builder.main else None
    if tracker is not None:
        tracker.figure("search", folder / "search.png")
    distiller.train(tracker, folder)
    if tracker is not None:
        tracker.close()
        model.network.eval().requires_grad_(False)
        model.save(folder / "value_model")
        curves(folder)
    accelerator.wait_for_everyone()
    return folder / "value_model"


def _search_text(found: Search, block: int, reward_block: int) -> str:
    lines = ["mean squared residual on held-out images, by backbone block (rows) and reward block"]
    lines.append("          " + "".join(f"{j:>10}" for j in found.reward_blocks))
    for row, i in enumerate(found.blocks):
        name = "latent" if i == 0 else str(i)
        lines.append(f"{name:>10}" + "".join(f"{float(value):>10.4g}" for value in found.held_out[row]))
    lines.append(f"chosen: backbone block {block}, reward block {reward_block}")
    return "\n".join(lines)
