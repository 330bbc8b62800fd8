"""The plan of a run: what it will do, what it costs, and whether it will fit."""

from collections.abc import Callable

import torch

from nft.compilation import Compilation
from nft.config import Recipe
from nft.cost.memory import CONTEXT, GIB, RESERVE, memory, with_overhead
from nft.cost.shapes import Costs, costs
from nft.geometry import Geometry, geometry_of
from nft.objectives import objective_class
from nft.policy import ADAPTERS
from nft.prompts import cache_line
from stitchvm_reward.errors import InputError
from stitchvm_reward.families import architecture_of, family_of
from stitchvm_reward.runs.launcher import threads_line


def recipe_geometry(recipe: Recipe, processes: int) -> Geometry:
    """Return the geometry of a recipe on so many processes. Its micro batches must be numbers."""
    return geometry_of(recipe.rollout, recipe.train.updates_per_epoch, processes, recipe.train.micro_batch)


def too_large(expected: dict[str, float], available: float) -> str | None:
    """Describe a run whose largest phase needs more GiB than there are, CUDA's own included; None where it fits."""
    phase = max(expected, key=lambda name: expected[name])
    needed = with_overhead(expected[phase])
    if needed <= available:
        return None
    return (
        f"{phase} needs about {needed:.1f} GiB, this device has {available:.1f}: lower its micro_batch, "
        "or set train.gradient_checkpointing, model.vae_slicing, train.optimizer=adamw_8bit"
    )


def memory_warning(recipe: Recipe) -> list[str]:
    """Return one line where the device at hand has less memory than the run is expected to need."""
    if not torch.cuda.is_available():
        return []
    message = too_large(memory(recipe), torch.cuda.get_device_properties(0).total_memory / GIB)
    return [f"warning      {message}"] if message else []


def memory_lines(recipe: Recipe) -> list[str]:
    """Return the expected peak of each phase, and what CUDA takes beside it."""
    expected = memory(recipe)
    largest = max(expected.values())
    return [
        *(f"memory       {phase}: about {size:.1f} GiB" for phase, size in expected.items()),
        f"             and beside the largest: CUDA context {CONTEXT:g} GiB, allocator's reserve {RESERVE:.0%}: "
        f"{with_overhead(largest):.1f} GiB in all",
    ]


def work(recipe: Recipe, geometry: Geometry, cost: Costs) -> dict[str, float]:
    """Return the TFLOP of one epoch over all processes, by phase."""
    samples, window = geometry.samples, recipe.rollout.stop_window
    in_update = objective_class(recipe.train.objective).cost(recipe.train)
    steps = sum(window) / 2 if window else recipe.rollout.steps
    decode, score = cost.decode_flops, cost.score_flops
    if in_update.reward_gradient:
        decode, score = cost.decode_training_flops, cost.score_training_flops
    to_image = (recipe.rollout.steps - steps) * cost.forward_flops + cost.decode_flops + cost.pixel_score_flops
    audits = recipe.audit.samples / recipe.audit.every if recipe.audit.every else 0.0
    each_pass = cost.training_flops + in_update.frozen * cost.forward_flops
    return {
        "rollout": samples * (steps - in_update.solver_steps) * cost.forward_flops / 1e12,
        "decode": 0.0 if window else samples * decode / 1e12,
        "score": samples * score / 1e12,
        "audit": audits * to_image / 1e12,
        "train": samples * in_update.passes * each_pass / 1e12,
    }


def announce(recipe: Recipe, processes: int, compiled: Compilation, write: Callable[[str], None]) -> dict[str, float]:
    """Write what a run will do and whether it will fit, and return what an epoch costs.

    `cost/teraflop` is over all processes; it is missing for a model whose shapes are not known here.
    """
    lines = [*work_lines(recipe, processes), compiled.line(), threads_line()]
    try:
        cost = costs(recipe)
    except InputError:
        write("\n".join(lines))
        return {}
    write("\n".join([*lines, *memory_warning(recipe)]))
    return {"cost/teraflop": sum(work(recipe, recipe_geometry(recipe, processes), cost).values())}


def _guidance_text(recipe: Recipe) -> str:
    """Say which guidance rollouts have, from the recipe alone."""
    if recipe.model.guidance is not None:
        return f"embedded guidance {recipe.model.guidance:g}"
    try:
        architecture = architecture_of(recipe.model.path)
    except InputError:
        return "no guidance"
    family = architecture.family
    return (
        f"embedded guidance {family.guidance:g}" if family.embeds_guidance(architecture.transformer) else "no guidance"
    )


def work_lines(recipe: Recipe, processes: int) -> list[str]:
    """Return what a run will do, from its recipe alone."""
    rollout, train, geometry = recipe.rollout, recipe.train, recipe_geometry(recipe, processes)
    shares = geometry.rollout_rounds()
    evaluated = recipe.evaluation.micro_batch or rollout.micro_batch
    shares_text = f"{min(shares)}" if min(shares) == max(shares) else f"{min(shares)} to {max(shares)}"
    rounds = sum(geometry.rounds(update) for update in range(train.updates_per_epoch))
    training, passes = objective_class(train.objective).describe(train, rollout, rounds)
    return [
        f"rewards      {', '.join(f'{r.weight:g} x {r.name}' for r in recipe.rewards)}",
        f"epoch        {rollout.groups} groups x {rollout.group_size} = {geometry.samples} samples, "
        f"in {sum(shares)} micro batches of {rollout.micro_batch}",
        f"processes    {processes}, with {shares_text} micro batches each",
        f"rollout      {rollout.steps} {rollout.solver} steps with {_guidance_text(recipe)}"
        + (f", stopped after {rollout.stop_window[0]} to {rollout.stop_window[1]}" if rollout.stop_window else ""),
        f"micro batch  {rollout.micro_batch} in rollouts, {geometry.train_micro_batch} in training, {evaluated} in "
        "evaluation",
        f"training     {training}",
        f"updates      {train.updates_per_epoch} per epoch, {passes} per process, gradients reduced "
        f"{train.updates_per_epoch} times",
        f"run          {recipe.epochs} epochs, {recipe.epochs * train.updates_per_epoch} optimizer steps, "
        f"{recipe.epochs * geometry.samples:,} images",
    ]


def cost_lines(recipe: Recipe, processes: int) -> list[str]:
    """Return what a run's model is and what an epoch costs."""
    cost = costs(recipe)
    phases = work(recipe, recipe_geometry(recipe, processes), cost)
    return [
        f"model        {recipe.model.path} ({family_of(recipe.model.path).name}), {recipe.model.dtype}, "
        f"{recipe.model.resolution} px, {cost.base_parameters:,} parameters in the transformer",
        f"adapters     rank {recipe.lora.rank}, alpha {recipe.lora.alpha}: {cost.adapted_layers} layers, "
        f"{cost.adapter_parameters:,} parameters, three of them ({', '.join(ADAPTERS)})",
        cache_line(recipe),
        *memory_lines(recipe),
        *memory_warning(recipe),
        f"FLOPs        one sample: forward {cost.forward_flops / 1e12:.3g}, forward and backward "
        f"{cost.training_flops / 1e12:.3g}, decode {cost.decode_flops / 1e12:.3g} TFLOP",
        f"             one epoch: {', '.join(f'{phase} {tflop:,.3g}' for phase, tflop in phases.items())} TFLOP; "
        + (f"not counted: {', '.join(cost.score_unknown)}; " if cost.score_unknown else "")
        + f"{sum(phases.values()) / processes:,.3g} per process",
    ]
