"""The plan of a run, computed on the meta device: no weights are loaded and no hub is asked."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import CLIPConfig, CLIPModel

from nft.config import Recipe
from nft.geometry import Geometry, geometry_of
from nft.policy import ADAPTERS, Policy
from stitchvm_reward.diffusion.architectures import CLIPS, TEXT_PARAMETERS, clip_configuration, configurations
from stitchvm_reward.diffusion.backbone import BackboneHead
from stitchvm_reward.diffusion.generator import Conditions
from stitchvm_reward.errors import InputError
from stitchvm_reward.hub import is_hub_id
from stitchvm_reward.stitching.benchmark import flops
from stitchvm_reward.stitching.value_model import empty_network, read_config

GIB = 2**30


@dataclass(frozen=True)
class Costs:
    """Shapes and costs of a recipe's model; FLOPs are multiply-adds times two, of one sample.

    `training_flops` are a forward and a backward pass. Where the reward is back-propagated, `decode_training_flops` and
    `score_training_flops` are likewise, and `judging_bytes` what decoder and rewards keep between the two passes.
    """

    base_parameters: int
    adapted_layers: int
    adapter_parameters: int
    vae_parameters: int
    forward_flops: float
    training_flops: float
    decode_flops: float
    score_flops: float
    pixel_score_flops: float
    reward_bytes: int
    score_unknown: list[str]
    saved_bytes: int
    block_input_bytes: int
    blocks: int
    decode_training_flops: float = 0.0
    score_training_flops: float = 0.0
    judging_bytes: int = 0


def _training_costs(call: Callable[[], torch.Tensor], parameters: bool = True) -> tuple[float, int]:
    """FLOPs of a call and of its sum's backward pass, and the bytes that autograd keeps between, each storage once.

    Frozen weights are kept by reference: they are among those bytes, or not where `parameters` are left out.
    """
    sizes: dict[int, int] = {}

    def keep(tensor):
        if not parameters and isinstance(tensor._base if tensor._is_view() else tensor, torch.nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        sizes[id(storage)] = storage.nbytes()
        alive.append(storage)
        return tensor

    def both():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            end = call().sum()
        end.backward()

    alive: list = []
    return flops(both), sum(sizes.values())


def _clip_costs(model: str) -> tuple[float | None, int]:
    """FLOPs of one image through a CLIP model's vision tower, and the bytes of all its weights in float32.

    None and 0 for a hub id whose shape is not known here.
    """
    if is_hub_id(model) and model not in CLIPS:
        return None, 0
    clip, judged = _clip_call(model)
    return flops(judged), 4 * sum(p.numel() for p in clip.parameters())


def _clip_call(model: str) -> tuple[CLIPModel, Callable[[], torch.Tensor]]:
    """A CLIP model without weights, and a call that embeds one image; differentiable in it where grad mode is on."""
    clip = CLIPModel(CLIPConfig(**clip_configuration(model))).requires_grad_(False)
    side = clip.config.vision_config.image_size
    pixels = torch.zeros(1, 3, side, side, requires_grad=True)
    return clip, lambda: clip.get_image_features(pixel_values=pixels).pooler_output


def _value_call(
    folder: str, transformer: SD3Transformer2DModel, clip_tokens: int, t5_length: int
) -> Callable[[], torch.Tensor] | None:
    """A call that makes one score of a value model, with its backbone's blocks, differentiable in the latents where
    grad mode is on; None where its folder is not here yet."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return None
    config, head = read_config(path), BackboneHead(transformer)
    network, block = empty_network(config, head).requires_grad_(False), config["backbone"]["block"]
    width, pooled = transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim
    null = Conditions(torch.zeros(1, clip_tokens + t5_length, width), torch.zeros(1, pooled))
    latents = torch.zeros(1, *config["latent_shape"], requires_grad=True)
    return lambda: network(head.features(latents, torch.zeros(1), null, [block])[block])[1]


def _judging_costs(
    recipe: Recipe, vae: AutoencoderKL, latents: torch.Tensor, scores: list[Callable[[], torch.Tensor]]
) -> tuple[float, float, int]:
    """FLOPs of decoding one sample and of scoring it, each with its backward pass, and the bytes that they keep.

    A decoder that is checkpointed keeps its blocks' inputs and, one at a time, what is inside a block.
    """
    scored = [_training_costs(call, False) for call in scores]
    cost, kept = sum(one for one, _ in scored), sum(bytes for _, bytes in scored)
    if recipe.rollout.stop_window:
        return 0.0, cost, kept
    inputs: list[tuple[torch.nn.Module, torch.Size]] = []
    blocks = [vae.decoder.mid_block, *vae.decoder.up_blocks]
    hooks = [
        block.register_forward_pre_hook(lambda own, given: inputs.append((own, given[0].shape))) for block in blocks
    ]
    decode, saved = _training_costs(lambda: vae.decode(latents.float().requires_grad_()).sample, False)
    for hook in hooks:
        hook.remove()
    if recipe.train.gradient_checkpointing:
        inside = [
            _training_costs(partial(block, torch.zeros(shape, requires_grad=True)), False)[1] for block, shape in inputs
        ]
        saved = sum(4 * shape.numel() for _, shape in inputs) + max(inside)
    return decode, cost, kept + saved * getattr(torch, recipe.model.vae_dtype).itemsize // 4


def _clip_folders(recipe: Recipe) -> list[str]:
    """The CLIP models that judge images, those that value models stand for among them where their folders are here."""
    values = [Path(reward.value_model).expanduser() for reward in recipe.rewards if reward.kind == "value"]
    stitched = [read_config(folder)["reward"]["path"] for folder in values if folder.is_dir()]
    return [*stitched, *(reward.model for reward in recipe.rewards if reward.model)]


def costs(recipe: Recipe) -> Costs:
    """Count parameters, FLOPs and the memory of one sample's training pass on the meta device, once in a process."""
    values = [Path(reward.value_model).expanduser() / "config.json" for reward in recipe.rewards if reward.value_model]
    built = [path.read_text() if path.is_file() else "" for path in values]
    judged = recipe.train.objective, recipe.train.gradient_checkpointing, recipe.rollout.stop_window
    key = repr((recipe.model, recipe.lora, recipe.rewards, built, judged))
    if key not in _known:
        _known[key] = _count(recipe)
    return _known[key]


_known: dict[str, Costs] = {}


def _count(recipe: Recipe) -> Costs:
    transformer_config, vae_config, clip_tokens = configurations(recipe.model.path)
    dtype = getattr(torch, recipe.model.dtype)
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(transformer_config).to(dtype).requires_grad_(False)
        vae = AutoencoderKL.from_config(vae_config).requires_grad_(False)
        base = sum(p.numel() for p in transformer.parameters())
        values = {
            reward.name: _value_call(reward.value_model, transformer, clip_tokens, recipe.model.t5_length)
            for reward in recipe.rewards
            if reward.kind == "value"
        }
        with torch.no_grad():
            judges = _clip_folders(recipe)
            clips = {model: _clip_costs(model) for model in dict.fromkeys(judges)}
            scores = {name: None if call is None else flops(call) for name, call in values.items()}
            scores |= {reward.name: clips[reward.model][0] for reward in recipe.rewards if reward.model}
        policy = Policy(transformer, recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets, recipe.seed)
        policy.network.to("meta")
        side = recipe.model.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
        config = transformer.config
        latents = torch.zeros(1, config.in_channels, side, side, dtype=dtype)
        inputs = {
            "hidden_states": latents,
            "encoder_hidden_states": torch.zeros(
                1, clip_tokens + recipe.model.t5_length, config.joint_attention_dim, dtype=dtype
            ),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim, dtype=dtype),
            "timestep": torch.zeros(1),
        }
        with torch.no_grad(), policy.using(None):
            forward = flops(lambda: transformer(**inputs))
        with torch.no_grad():
            decode = flops(lambda: vae.decode(latents.float()))
        training, saved = _training_costs(lambda: transformer(**inputs).sample)
        judging = 0.0, 0.0, 0
        if recipe.train.objective == "draft":
            calls = [call for call in values.values() if call is not None]
            calls += [_clip_call(reward.model)[1] for reward in recipe.rewards if clips.get(reward.model, (None, 0))[0]]
            with policy.using(None):
                judging = _judging_costs(recipe, vae, latents, calls)
        weights = sum(p.numel() * p.element_size() for p in transformer.parameters())
    return Costs(
        base_parameters=base,
        adapted_layers=len(policy.layers),
        adapter_parameters=sum(p.numel() for p in policy.tensors("current").values()),
        vae_parameters=sum(p.numel() for p in vae.parameters()),
        forward_flops=forward,
        training_flops=training,
        decode_flops=decode,
        score_flops=sum(cost or 0.0 for cost in scores.values()),
        pixel_score_flops=sum(clips[model][0] or 0.0 for model in judges),
        reward_bytes=sum(clips[model][1] for model in judges),
        score_unknown=[reward.name for reward in recipe.rewards if scores.get(reward.name) is None],
        # Frozen weights are saved by reference for the backward pass; they are counted with the weights.
        saved_bytes=max(0, saved - weights),
        block_input_bytes=(inputs["encoder_hidden_states"].shape[1] + (side // config.patch_size) ** 2)
        * transformer.inner_dim
        * dtype.itemsize,
        blocks=config.num_layers,
        decode_training_flops=judging[0],
        score_training_flops=judging[1],
        judging_bytes=judging[2],
    )


def memory(recipe: Recipe, found: Costs) -> dict[str, float]:
    """Expected GiB of one process in each phase, from weights, adapters, optimizer state and saved activations.

    Computed from shapes, not measured. Value models beside the rewards they were stitched from are left out.
    """
    width, vae_width = (getattr(torch, name).itemsize for name in (recipe.model.dtype, recipe.model.vae_dtype))
    frozen = found.base_parameters * width + found.vae_parameters * vae_width + found.reward_bytes
    # Three adapters and one gradient in float32, two Adam moments in float32 or in 8 bits.
    moments = 2 * (1 if recipe.train.optimizer == "adamw_8bit" else 4)
    kept = frozen + found.adapter_parameters * (4 * (len(ADAPTERS) + 1) + moments)
    batch, block = recipe.rollout.micro_batch, found.saved_bytes / found.blocks
    decoded = (1 if recipe.model.vae_slicing else batch) * recipe.model.resolution**2 * vae_width
    saved = found.blocks * found.block_input_bytes + block if recipe.train.gradient_checkpointing else found.saved_bytes
    if recipe.train.objective == "draft":
        # Checkpointed steps are run again one at a time, after the rewards' part is gone.
        ours = recipe.train.gradient_checkpointing
        saved = max(saved, found.judging_bytes) if ours else recipe.train.draft_steps * saved + found.judging_bytes
    encoders = TEXT_PARAMETERS * width if "stabilityai/" in recipe.model.path else 0
    phases = {
        "encode prompts": encoders + found.reward_bytes,
        "rollout": kept + batch * block,
        # The decoder's widest layers hold 128 channels at full resolution, about four of them at once.
        "decode": kept + decoded * 128 * 4,
        "train": kept + batch * saved,
    }
    return {phase: size / GIB for phase, size in phases.items()}


def too_large(expected: dict[str, float], available: float) -> str | None:
    """What to say of a run whose largest phase needs more GiB than there are, or None where it fits."""
    phase = max(expected, key=lambda name: expected[name])
    if expected[phase] <= available:
        return None
    return (
        f"{phase} needs about {expected[phase]:.1f} GiB, this device has {available:.1f}: lower rollout.micro_batch, "
        "or set train.gradient_checkpointing, model.vae_slicing, train.optimizer=adamw_8bit"
    )


def memory_warning(recipe: Recipe, found: Costs) -> list[str]:
    """One line where the device at hand has less memory than the run is expected to need."""
    if not torch.cuda.is_available():
        return []
    told = too_large(memory(recipe, found), torch.cuda.get_device_properties(0).total_memory / GIB)
    return [f"warning      {told}"] if told else []


def work(recipe: Recipe, geometry: Geometry, found: Costs) -> dict[str, float]:
    """TFLOP of one epoch over all processes, by phase."""
    train, samples = recipe.train, geometry.samples
    # The old policy needs its own forward only while it differs from the current one.
    shared_old = train.old_schedule == 0 and train.updates_per_epoch == 1
    extra = (0 if shared_old else 1) + (1 if train.beta_kl > 0 else 0)
    passes = samples * train.levels_per_sample
    window = recipe.rollout.stop_window
    steps = sum(window) / 2 if window else recipe.rollout.steps
    decode, score = found.decode_flops, found.score_flops
    taken = steps
    if train.objective == "draft":
        # The last steps are taken in the update, and what judges them has a backward pass.
        passes, taken = samples * train.draft_steps, steps - train.draft_steps
        extra = 1 if train.beta_kl > 0 else 0
        decode, score = found.decode_training_flops, found.score_training_flops
    to_image = (recipe.rollout.steps - steps) * found.forward_flops + found.decode_flops + found.pixel_score_flops
    audits = recipe.audit.samples / recipe.audit.every if recipe.audit.every else 0.0
    return {
        "rollout": samples * taken * found.forward_flops / 1e12,
        "decode": 0.0 if window else samples * decode / 1e12,
        "score": samples * score / 1e12,
        "audit": audits * to_image / 1e12,
        "train": passes * (found.training_flops + extra * found.forward_flops) / 1e12,
    }


def announce(recipe: Recipe, processes: int, tell: Callable[[str], None]) -> dict[str, float]:
    """Tell what a run will do and whether it will fit, before it begins; returns what an epoch costs.

    `cost/teraflop` is over all processes; there is none for a model whose shape is not known here.
    """
    try:
        found = costs(recipe)
    except InputError:
        tell("\n".join(work_lines(recipe, processes)))
        return {}
    tell("\n".join([*work_lines(recipe, processes), *memory_warning(recipe, found)]))
    return {"cost/teraflop": sum(work(recipe, geometry_of(recipe, processes), found).values())}


def work_lines(recipe: Recipe, processes: int) -> list[str]:
    """What a run will do, from its recipe alone."""
    rollout, train, geometry = recipe.rollout, recipe.train, geometry_of(recipe, processes)
    shares = [len(own) for own in geometry.deal()]
    shares_text = f"{min(shares)}" if min(shares) == max(shares) else f"{min(shares)} to {max(shares)}"
    rounds = sum(geometry.rounds(update) for update in range(train.updates_per_epoch))
    if train.objective == "draft":
        last = f"the last {train.draft_steps} solver steps" if train.draft_steps > 1 else "the last solver step"
        told = f"the reward back-propagated through {last}, beta_kl {train.beta_kl:g}"
        passes = f"{rounds} forward and backward passes through {last} and the reward"
    else:
        choice = f"{train.levels_per_sample} of {rollout.steps} grid" if train.levels == "grid" else "continuous"
        told = f"{choice} levels a sample, {train.space} space, beta {train.beta:g}, beta_kl {train.beta_kl:g}"
        passes = f"{rounds * train.levels_per_sample} forward and backward passes"
    return [
        f"rewards      {', '.join(f'{r.weight:g} x {r.name}' for r in recipe.rewards)}",
        f"epoch        {rollout.groups} groups x {rollout.group_size} = {geometry.samples} samples, "
        f"in {geometry.batches} micro batches of {rollout.micro_batch}",
        f"processes    {processes}, with {shares_text} micro batches each",
        f"rollout      {rollout.steps} {rollout.solver} steps without guidance"
        + (f", stopped after {rollout.stop_window[0]} to {rollout.stop_window[1]}" if rollout.stop_window else ""),
        f"training     {told}",
        f"updates      {train.updates_per_epoch} an epoch, {passes} a process, gradients reduced "
        f"{train.updates_per_epoch} times",
        f"run          {recipe.epochs} epochs, {recipe.epochs * train.updates_per_epoch} optimizer steps, "
        f"{recipe.epochs * geometry.samples:,} images",
    ]


def cost_lines(recipe: Recipe, processes: int) -> list[str]:
    """What a run's model is and what an epoch costs."""
    found = costs(recipe)
    phases = work(recipe, geometry_of(recipe, processes), found)
    return [
        f"model        {recipe.model.path}, {recipe.model.dtype}, {recipe.model.resolution} px, "
        f"{found.base_parameters:,} parameters in the transformer",
        f"adapters     rank {recipe.lora.rank}, alpha {recipe.lora.alpha}: {found.adapted_layers} layers, "
        f"{found.adapter_parameters:,} parameters, three of them ({', '.join(ADAPTERS)})",
        *(f"memory       {phase}: about {size:.1f} GiB" for phase, size in memory(recipe, found).items()),
        *memory_warning(recipe, found),
        f"FLOPs        one sample: forward {found.forward_flops / 1e12:.3g}, forward and backward "
        f"{found.training_flops / 1e12:.3g}, decode {found.decode_flops / 1e12:.3g} TFLOP",
        f"             one epoch: {', '.join(f'{phase} {cost:,.3g}' for phase, cost in phases.items())} TFLOP; "
        + (f"not counted: {', '.join(found.score_unknown)}; " if found.score_unknown else "")
        + f"a process {sum(phases.values()) / processes:,.3g}",
    ]


def print_plan(recipe: Recipe, processes: int) -> None:
    """Print the whole plan of a recipe on so many processes."""
    print("\n".join([*work_lines(recipe, processes), *cost_lines(recipe, processes)]))
