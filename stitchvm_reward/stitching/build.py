"""From a recipe to a value model: targets, search, finetuning and the folder."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from stitchvm_reward.diffusion.backbone import load_backbone
from stitchvm_reward.diffusion.generator import load_vae
from stitchvm_reward.diffusion.path import noised
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import architecture_of
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.files import write_json
from stitchvm_reward.rewards.aesthetic import load_head
from stitchvm_reward.rewards.clip import ImageTower, TextTower
from stitchvm_reward.rewards.tail import RewardTail, vision_states
from stitchvm_reward.runs import checkpoint, randomness
from stitchvm_reward.runs.geometry import share
from stitchvm_reward.runs.pictures import curves
from stitchvm_reward.runs.rank_sync import RankSync, Stopped, mark_stopped
from stitchvm_reward.runs.run_folder import prepare_run_folder, write_recipe
from stitchvm_reward.runs.tracking import Tracker
from stitchvm_reward.stitching.check import check_stitch_recipe, needed_images
from stitchvm_reward.stitching.config import StitchRecipe
from stitchvm_reward.stitching.distill import Distiller
from stitchvm_reward.stitching.generate import GeneratedImages
from stitchvm_reward.stitching.images import find_images
from stitchvm_reward.stitching.search import Moments, Search, backbone_features, heat_map, initial_weights, search
from stitchvm_reward.stitching.teacher_cache import (
    Images,
    TeacherCache,
    compute,
    open_teacher_cache,
    shard_count,
    teacher_folder,
)
from stitchvm_reward.stitching.value_model import FORMAT, StitchedValueModel, ValueNetwork, depth_of

PROMPT_CACHE = "prompts"
Captions = Callable[[list[int]], Conditions]


class Builder:
    """What search and finetuning share: the images, their targets and the frozen networks."""

    def __init__(self, recipe: StitchRecipe, ranks: RankSync):
        self.recipe, self.ranks, self.accelerator = recipe, ranks, ranks.accelerator
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        data, model = recipe.data, recipe.model
        self.architecture = architecture_of(model.path)
        self.latent_shape = self.architecture.latent_shape(model.resolution)
        self.images: Images = self._find_images()
        self.prompt_cache = PromptCache(model, str(Path(data.cache) / PROMPT_CACHE), self.device)
        self._encode([""], "encode the empty prompt")
        self.null = self.prompt_cache.conditions([""])
        self.tower = ImageTower(recipe.reward.model, recipe.reward.kind, self.device)
        self.latent_space, self.targets = self._compute_targets()
        if self.main and self.targets.broken:
            names = ", ".join(self.targets.broken[:5])
            tqdm.write(f"{len(self.targets.broken)} broken or empty images are left out: {names}")
        # Positions among the targets; those excluded from fitting come first.
        split = randomness.at(recipe.seed, randomness.SPLIT)
        self.order: list[int] = torch.randperm(len(self.targets), generator=split).tolist()
        # Read before the run folder is claimed: a missing caption is told before anything is written.
        self.texts: dict[int, str] = {}
        if recipe.backbone.conditioning == "prompt":
            self.texts = {index: self.images.caption(row) for index, row in enumerate(self.targets.rows)}
        blocks = recipe.backbone.block if recipe.backbone.block is not None else depth_of(self.architecture)
        self.head = load_backbone(model.path, blocks, model.torch_dtype, self.device, model.guidance)

    def _find_images(self) -> Images:
        """Return the images, after drawing those of data.generate that are missing, shared out over the processes."""
        data = self.recipe.data
        if not data.generate.images:
            return find_images(data.images, data.split, data.column, data.captions, data.limit)
        images = GeneratedImages(self.recipe, self.device)
        missing = images.missing()
        local = share(len(missing), self.accelerator.process_index, self.accelerator.num_processes)
        shards = self._rounds(missing[local.start : local.stop], "draw images")
        if missing:
            with self.ranks.together():
                images.draw(shards)
        return images

    def _rounds(self, items: Sequence[int], phase: str) -> Iterator[int]:
        """Yield this process's items under a progress bar; after each, all processes meet and may stop."""
        rounds = self.ranks.rounds(items)
        with self.ranks.timings.phase(phase):
            for item in tqdm(
                rounds,
                desc=phase,
                total=len(items),
                leave=False,
                disable=not (self.main and items),
                dynamic_ncols=True,
            ):
                with self.ranks.together():
                    if item is not None:
                        yield item

    def _encode(self, texts: Iterable[str], phase: str) -> None:
        """Encode the texts that are not on disk yet, shared out over the processes."""
        distinct, ranks = list(dict.fromkeys(texts)), self.ranks.accelerator
        local = share(len(distinct), ranks.process_index, ranks.num_processes)
        with self.ranks.together():
            self.prompt_cache.ensure(
                distinct[local.start : local.stop], progress=lambda batches: self._rounds(batches, phase)
            )

    def _compute_targets(self) -> tuple[dict[str, Any], TeacherCache]:
        """Compute this process's share of the missing targets and open all of them; the autoencoder is freed."""
        recipe, family = self.recipe, self.architecture.family
        images = self.images
        vae = images.vae if isinstance(images, GeneratedImages) else load_vae(recipe.model.path, self.device)

        def encode(indices: list[int], batch: Tensor) -> Tensor:
            return images.latents(indices) if isinstance(images, GeneratedImages) else family.encode_images(vae, batch)

        latent_space = family.latent_space(vae)
        key = {
            "vae": latent_space,
            "reward": _digest(self.tower),
            "fit": self.tower.fit.__name__,  # kinds of reward may share a tower and crop images differently
            "side": recipe.model.resolution,
        }
        folder = teacher_folder(recipe.data.cache, self.images, key)
        shards = range(shard_count(self.images))
        local = share(len(shards), self.accelerator.process_index, self.accelerator.num_processes)
        compute(
            folder,
            self.images,
            self._rounds(shards[local.start : local.stop], "latents and targets"),
            side=recipe.model.resolution,
            micro_batch=recipe.finetune.micro_batch,
            encode=encode,
            tower=self.tower,
        )
        return latent_space, open_teacher_cache(folder, images, needed_images(recipe))

    def captions(self, order: list[int]) -> Captions | None:
        """Return a function from positions among the targets to the conditions of their captions.

        Return None if the backbone reads the empty prompt.
        """
        if not self.texts:
            return None
        self._encode([self.texts[index] for index in order], "encode captions")
        return lambda indices: self.prompt_cache.conditions([self.texts[index] for index in indices])

    @torch.no_grad()
    def probe(self, blocks: list[int], reward_blocks: list[int]) -> tuple[Moments, Moments]:
        """Return the sums over the search's images, those to fit and those to compare on, from all processes.

        Each image passes each model once, on one process, with its own noise and its own level t ~ U[0, 1].
        """
        recipe, size, vision = self.recipe, self.recipe.finetune.micro_batch, self.tower.clip.config.vision_config
        grid = vision.image_size // vision.patch_size
        chosen = self.order[recipe.data.held_out :][: recipe.search.probe + recipe.search.held_out]
        conditions = self.captions(chosen)
        widths = {i: self.head.width(i, self.latent_shape[0]) for i in blocks}
        targets = dict.fromkeys(reward_blocks, vision.hidden_size)
        parts = [Moments(widths, targets, grid**2, self.device) for _ in range(2)]
        images = chosen[: recipe.search.probe], chosen[recipe.search.probe :]
        batches = [(n, part[k : k + size]) for n, part in enumerate(images) for k in range(0, len(part), size)]
        local = share(len(batches), self.accelerator.process_index, self.accelerator.num_processes)
        for place in self._rounds(local, "search: features"):
            number, indices = batches[place]
            self._add(parts[number], indices, conditions, grid)
        for tensor in (tensor for part in parts for tensor in part.tensors()):
            self.ranks.total(tensor)
        if isinstance(self.images, GeneratedImages):
            self.images.free()
        return parts[0], parts[1]

    def _add(self, moments: Moments, indices: list[int], conditions: Captions | None, grid: int) -> None:
        """Add some images to the sums."""
        rows, reward_blocks = [self.targets.rows[index] for index in indices], list(moments.target_widths)
        noisy, sigma = self._noisy(indices, rows)
        selected = self.null.expand(len(indices)) if conditions is None else conditions(indices)
        features = backbone_features(self.head, noisy, sigma, selected, blocks=list(moments.widths), side=grid)
        pixels = self.tower.pixels(torch.stack([self._image(row) for row in rows]))
        states = vision_states(self.tower.clip, pixels, max(reward_blocks) - 1)
        reward = {j: states[0] if j == 1 else states[j - 1][:, 1:] for j in reward_blocks}
        moments.add(features, reward, {j: states[j - 1][:, 0] for j in reward_blocks if j > 1})

    def _noisy(self, indices: list[int], rows: list[int]) -> tuple[Tensor, Tensor]:
        """Return noisy latents of some targets and their levels; `rows` address the randomness."""
        (latents,) = self.targets.read(indices, ("latents",))
        draws = [randomness.at(self.recipe.seed, randomness.PROBE, row) for row in rows]
        sigma = torch.cat([torch.rand(1, generator=g) for g in draws]).to(self.device)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in draws])
        return noised(latents.to(self.device), noise.to(self.device), sigma), sigma

    def _image(self, row: int) -> Tensor:
        image = self.images.load(row, self.recipe.model.resolution)
        if image is None:
            raise InputError(f"{self.images.names[row]} could be read before and cannot be read now")
        return image

    def model(self, probe: Moments, block: int, reward_block: int) -> StitchedValueModel:
        """Return the stitched model of a pair of blocks as the search initialises it, before finetuning."""
        recipe = self.recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(randomness.at(recipe.seed, randomness.ADAPTERS).initial_seed())
            width = self.head.width(block, self.latent_shape[0])
            network = ValueNetwork(width, RewardTail(self.tower.clip, reward_block))
        solution, class_state, offsets = initial_weights(probe, block, reward_block)
        network.stitch.set_linear(solution)
        if class_state is not None and offsets is not None:
            network.tail.set_start(class_state, offsets)
        if recipe.reward.kind == "aesthetic":
            readout: Any = load_head(recipe.reward.head).to(self.device)
        else:
            readout = TextTower(self.tower.clip, self.tower.folder, recipe.reward.kind)
        config = self._config(block, reward_block)
        return StitchedValueModel(self.head, network.to(self.device), readout, self.null, config)

    def _config(self, block: int, reward_block: int) -> dict[str, Any]:
        """Return the content of the value model's config.json."""
        recipe, clip = self.recipe, self.tower.clip
        model = dataclasses.asdict(recipe.model)
        for setting in ("deterministic", "tf32"):  # of the machine, not of the model
            del model[setting]
        backbone = {
            "guidance": self.head.guidance,
            "block": block,
            "conditioning": recipe.backbone.conditioning,
            "signature": self.head.signature(block),
        }
        return {
            "format": FORMAT,
            "backbone": model | backbone,
            "vae": self.latent_space,
            "reward": {
                "kind": recipe.reward.kind,
                "path": recipe.reward.model,
                "head": recipe.reward.head,
                "block": reward_block,
                "vision": clip.config.vision_config.to_diff_dict(),
                "projection": clip.config.projection_dim,
            },
            "resolution": recipe.model.resolution,
            "latent_shape": list(self.latent_shape),
            "dtype": "float16",
            "training": {"images": self._source(), "count": len(self.targets), "seed": recipe.seed}
            | dataclasses.asdict(recipe.finetune),
        }

    def _source(self) -> str | dict[str, Any]:
        """Return where the images are from: a folder, a data set, or how the model drew them."""
        drawn = isinstance(self.images, GeneratedImages)
        return dataclasses.asdict(self.recipe.data.generate) if drawn else self.recipe.data.images


def _digest(tower: ImageTower) -> str:
    """Identify a reward's image tower by its activation function and some of its weights."""
    digest = hashlib.sha256(tower.clip.config.vision_config.hidden_act.encode())
    for _, tensor in sorted(tower.clip.vision_model.state_dict().items()):
        digest.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def run_search(builder: Builder, folder: Path | None) -> tuple[Moments, Search]:
    """Run stage 1 over all blocks; write search.json and search.png where `folder` is given.

    Returns the sums over all images of the search too, for the initial weights.
    """
    recipe, ranks = builder.recipe, builder.ranks
    blocks = list(range(builder.head.blocks + 1))
    if recipe.backbone.block is not None:
        blocks = [recipe.backbone.block]
    fitted, held_out = builder.probe(blocks, list(range(1, recipe.search.last_reward_block + 1)))
    with ranks.timings.phase("search: fits"):
        mine = share(len(blocks), ranks.accelerator.process_index, ranks.accelerator.num_processes)
        result = search(fitted, held_out, blocks[mine.start : mine.stop], ranks.total)
    if folder is not None:
        write_json(folder / "search.json", result.table())
        heat_map(result, folder / "search.png")
    return fitted.plus(held_out), result


def build(
    recipe: StitchRecipe, accelerator: Accelerator, only_search: bool = False, ranks: RankSync | None = None
) -> Path | None:
    """As `build_value_model`, but return None after a signal to any process, with one line that says so."""
    try:
        return build_value_model(recipe, ranks or RankSync(accelerator), only_search)
    except Stopped as stopped:
        if accelerator.is_main_process:
            mark_stopped(str(stopped))
            tqdm.write(f"{stopped}; run the same command again to continue")
        return None


def build_value_model(recipe: StitchRecipe, ranks: RankSync, only_search: bool = False) -> Path:
    """Draw images where the recipe says so, search, finetune and save.

    Returns the folder of the value model, or of the search alone. Raises Stopped after a signal to any process, with a
    message. The next run with the same recipe then continues bit for bit, as it does after a crash.
    """
    check_stitch_recipe(recipe)
    try:
        builder = Builder(recipe, ranks)
        claim = None
        with ranks.together():
            if builder.main:
                claim = prepare_run_folder(recipe)
                write_recipe(recipe)
        with claim or contextlib.nullcontext():
            return _search_and_finetune(builder, only_search)
    except Stopped as stopped:
        raise Stopped(f"stopped by a signal {str(stopped) or 'before finetuning'}") from None


def _search_and_finetune(builder: Builder, only_search: bool) -> Path:
    recipe = builder.recipe
    folder = Path(recipe.out).expanduser()
    probe, result = run_search(builder, folder if builder.main else None)
    requested = recipe.backbone.block, recipe.reward.block
    block, reward_block = result.best(*(None if number is None else [number] for number in requested))
    if builder.main:
        tqdm.write(_search_text(result, block, reward_block))
    if only_search:
        return folder
    model = builder.model(probe, block, reward_block)
    del probe
    distiller = Distiller(
        recipe,
        builder.ranks,
        model,
        targets=builder.targets,
        order=builder.order,
        conditions=builder.captions(builder.order),
    )
    warn = tqdm.write if builder.main else lambda _: None
    path = checkpoint.choose(folder / "checkpoints", recipe.checkpoint.resume, warn)
    if path is not None:
        distiller.resume(path)
        warn(f"resumed from {path}")
    tracker = None
    with builder.ranks.together():
        if builder.main:
            first = distiller.epoch + 1 if distiller.step else 0
            tracker = Tracker(folder, first, recipe.tracking, dataclasses.asdict(recipe))
            tracker.figure("search", folder / "search.png")
    with contextlib.closing(tracker) if tracker is not None else contextlib.nullcontext():
        distiller.train(tracker, folder)
    with contextlib.suppress(Stopped), builder.ranks.together():  # a signal comes too late here: all is done
        if builder.main:
            model.network.eval().requires_grad_(False)
            model.save(folder / "value_model")
            curves(folder)
    return folder / "value_model"


def _search_text(result: Search, block: int, reward_block: int) -> str:
    lines = ["mean squared residual on held-out images, by backbone block (rows) and reward block"]
    lines.append("          " + "".join(f"{j:>10}" for j in result.reward_blocks))
    for row, i in enumerate(result.blocks):
        name = "latent" if i == 0 else str(i)
        lines.append(f"{name:>10}" + "".join(f"{float(value):>10.4g}" for value in result.held_out[row]))
    lines += result.dependent()
    lines.append(f"chosen: backbone block {block}, reward block {reward_block}")
    return "\n".join(lines)
