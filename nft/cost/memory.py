"""The device memory that a run needs, phase by phase: worked out on the meta device, where nothing is computed.

What stays on the device is counted from shapes. What a phase needs beside it is the peak of the tensors that its own
code creates, found by running that code without values. Attention counts as the fused kernels that GPUs run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from nft.audit import audited
from nft.config import Recipe
from nft.cost.networks import META, Networks, module_bytes
from nft.geometry import geometry_of
from nft.objectives import objective_class
from nft.policy import ADAPTERS
from nft.prompts import in_rounds
from stitchvm_reward.diffusion.prompt_cache import BATCH as ENCODED_AT_ONCE
from stitchvm_reward.diffusion.solvers import euler_step
from stitchvm_reward.measure import fused_attention, peak_mib

GIB = 2**30
CONTEXT = 0.5  # GiB of a process's CUDA context with its kernels
RESERVE = 0.05  # share that the caching allocator holds beyond what is in use: an allowance, not measured
TRACED = 2  # the micro batch that calls are traced with


@dataclass(frozen=True)
class Working:
    """The peak bytes of what a call creates, linear in its micro batch."""

    fixed: float
    per_sample: float

    def at(self, batch: int) -> float:
        return self.fixed + self.per_sample * batch


def peak_bytes(call: Callable[[], Any]) -> float:
    """Return the peak bytes of the tensors that a call on the meta device creates."""
    with fused_attention():
        return peak_mib(call, META) * 2**20


def working(call: Callable[[int], Any]) -> Working:
    """Return the peak of a call by its micro batch. Everything that a network creates is proportional to it."""
    return Working(0.0, peak_bytes(partial(call, TRACED)) / TRACED)


def sliced(call: Callable[[int], Any], result: int) -> Working:
    """Return the peak of a call that works on one sample at a time and keeps `result` bytes of each."""
    return Working(peak_bytes(partial(call, 1)) - result, result)


@dataclass(frozen=True)
class Needs:
    """Bytes that stay on the device, and what each kind of call needs beside them.

    `frozen` are the transformer and the autoencoder, `rewards` what scores images, `values` the value networks,
    `adapters` all adapters with their copies in the base's number format; `gradient` and `moments` are those of the
    trained one, in 32 bits each. `encoders` are the text encoders with what they compute, `prompt` the conditions of
    one prompt, `latents` those of one sample.
    """

    frozen: int
    rewards: int
    values: int
    adapters: int
    gradient: int
    moments: int
    encoders: float
    prompt: int
    latents: int
    step: Working
    decode: Working
    score: Working
    value: Working
    train: Working


@torch.no_grad()
def _encode(networks: Networks) -> float:
    """Return the bytes of the text encoders and of the largest one's activations."""
    encoders = networks.text_encoders()

    def encode(module: torch.nn.Module, length: int) -> Any:
        tokens = torch.zeros(ENCODED_AT_ONCE, length, dtype=torch.long, device=META)
        return module(tokens)

    largest = max(peak_bytes(partial(encode, *one)) for one in encoders)
    return sum(module_bytes(module) for module, _ in encoders) + largest


def _needs(recipe: Recipe) -> Needs:
    networks = Networks(recipe)
    side, trained = recipe.model.resolution, networks.policy.tensors("current").values()
    with META:
        for parameter in trained:  # gradients of earlier micro batches are there
            parameter.grad = torch.zeros_like(parameter)

    # Adapters that do not train keep a copy in the base's number format, which their first use makes.
    copies = sum(peak_bytes(partial(networks.adopt, name)) for name in ("old", "ema"))

    def step(batch: int) -> Any:
        latents, conditions = networks.latents(batch), networks.conditions(batch)
        return euler_step(latents, networks.velocity(latents, conditions, "old").float(), 1.0, 0.5)

    def decode(batch: int) -> Any:
        return networks.generator.decode(networks.latents(batch))

    with torch.no_grad():
        frozen_calls = {
            "step": working(step),
            "decode": sliced(decode, 4 * 3 * side**2) if recipe.model.vae_slicing else working(decode),
            "score": working(lambda batch: networks.score(torch.zeros(batch, 3, side, side, device=META))),
            "value": working(lambda batch: networks.value(networks.latents(batch))),
        }
    objective = objective_class(recipe.train.objective)
    adapter = sum(parameter.nbytes for parameter in trained)
    return Needs(
        frozen=networks.base_bytes + networks.vae_bytes,
        rewards=sum(module_bytes(clip) for _, clip in networks.pixel),
        values=sum(module_bytes(network) for _, network in networks.values),
        adapters=len(ADAPTERS) * adapter + int(copies),
        gradient=adapter,
        moments=2 * adapter,
        encoders=_encode(networks),
        prompt=sum(tensor.nbytes for tensor in networks.prompt.tensors.values()),
        latents=4 * networks.latents(1).numel(),
        train=working(lambda batch: objective.training_pass(networks, batch)),
        **frozen_calls,
    )


def most_audited(recipe: Recipe) -> int:
    """Return the largest number of samples of one micro batch that an audit of a run takes to the image."""
    audit, updates = recipe.audit, recipe.train.updates_per_epoch
    geometry = geometry_of(recipe.rollout, updates, 1, recipe.train.micro_batch)
    batches = [batch for part in range(geometry.parts) for batch in geometry.trainings(part)]
    most = 0
    for epoch in range(0, recipe.epochs if audit.every else 0, audit.every or 1):
        chosen = audited(geometry.samples, audit.samples, recipe.seed, epoch)
        most = max(most, *(len(chosen.intersection(batch)) for batch in batches))
    return most


_known: dict[str, Needs] = {}


def needs(recipe: Recipe) -> Needs:
    """Return what a recipe needs, counted once per process, whatever its micro batches and the size of its epoch.

    Raises InputError for a model whose shapes are not known here.
    """
    train, window = recipe.train, bool(recipe.rollout.stop_window)
    passes = replace(train, micro_batch=None, updates_per_epoch=min(train.updates_per_epoch, 2))
    key = repr((recipe.model, recipe.lora, recipe.rewards, window, passes))
    if key not in _known:
        _known[key] = _needs(recipe)
    return _known[key]


def memory(recipe: Recipe) -> dict[str, float]:
    """Return the peak GiB of the tensors of one process in each phase of a run.

    The phases have the names of their timings, and `optimizer` is the optimizer's step. Epochs after the first are
    meant: the optimizer has its moments. Neither the CUDA context nor the allocator's reserve is in it; see
    `with_overhead`. To ask about another micro batch, call it with
    `dataclasses.replace(recipe, rollout=dataclasses.replace(recipe.rollout, micro_batch=16))`: only the first call for
    a recipe traces its networks, which takes seconds.

    Raises InputError for a model whose shapes are not known here.
    """
    need, rollout, evaluation = needs(recipe), recipe.rollout, recipe.evaluation
    batch, window = rollout.micro_batch, bool(rollout.stop_window)
    trained, evaluated = recipe.train.micro_batch or batch, evaluation.micro_batch or batch
    moments = need.moments // (4 if recipe.train.optimizer == "adamw_8bit" else 1)
    in_update = objective_class(recipe.train.objective).cost(recipe.train)
    epoch = rollout.groups * (need.prompt + rollout.group_size * in_update.kept * need.latents)
    kept = need.frozen + need.rewards + need.values + need.adapters + moments
    images = 4 * 3 * recipe.model.resolution**2

    # Prompts are encoded before the generator is loaded; later rounds, beside all that is there by then.
    beside_encoders = kept + epoch if in_rounds(recipe) else need.rewards

    def to_image(size: int) -> float:
        return max(need.step.at(size), need.decode.at(size), need.score.at(size))

    phases = {
        "encode": need.encoders + beside_encoders,
        "rollout": kept + epoch + need.step.at(batch),
        "decode": kept + epoch + need.decode.at(batch),
        "score": kept + epoch + (need.value if window else need.score).at(batch),
        "audit": kept + epoch + to_image(most_audited(recipe)),
        "train": kept + epoch + need.gradient + need.train.at(trained),
        "optimizer": kept + epoch + need.gradient,
        "evaluate": kept + evaluation.grid * images + to_image(min(evaluated, evaluation.samples)),
    }
    if window:
        del phases["decode"]
    if not recipe.audit.every:
        del phases["audit"]
    if in_update.reward_gradient:
        for name in ("decode", "score"):  # part of the update
            phases.pop(name, None)
    return {name: size / GIB for name, size in phases.items()}


def with_overhead(peak: float) -> float:
    """Return the GiB of device memory that a process with so many GiB of tensors takes."""
    return peak * (1 + RESERVE) + CONTEXT
