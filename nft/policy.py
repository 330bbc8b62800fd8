"""The policy: low-rank adapters on one frozen network.

`current` is trained, `old` collects rollouts, `ema` is evaluated; with no adapter the network is the reference.
There are three named adapters instead of swapped weights, so that an autocast cache, a sharded optimizer or an
exception in between can never see the wrong ones.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from nft.adapters import AdaptedLinear
from stitchvm_reward.errors import InputError, nearest
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.recipe import at_least, one_of

ADAPTERS = ("current", "old", "ema")
INITS = ("gaussian", "kaiming")


@dataclass
class LoraRecipe:
    rank: int = 32
    """Rank of the adapters."""
    alpha: int = 64
    """Numerator of the scale: the update is alpha / rank * B A."""
    targets: list[str] = field(default_factory=list)
    """Layers to adapt, by the end of their names, such as `attn.to_q`. Empty: the attention projections that the
    model's family names."""
    init: str = "gaussian"
    """How A is initialised: gaussian (standard deviation 1 / rank, as in DiffusionNFT) or kaiming (uniform, PEFT's
    default). B starts at zero, so that the policy starts as the base model."""
    start: str = ""
    """LoRA file to start from instead, as launch/export.py or training writes it: of the same rank and on the same
    layers. The reference of train.beta_kl stays the base model."""

    def __post_init__(self):
        at_least("lora.rank", self.rank, 1)
        at_least("lora.alpha", self.alpha, 1)
        one_of("lora.init", self.init, INITS)


def old_decay(schedule: int, step: int) -> float:
    """Return the share of itself that the old policy keeps after an epoch (DiffusionNFT, section 3.4 and its code)."""
    if schedule == 0:
        return 0.0
    if schedule == 1:
        return min(0.001 * step, 0.5)
    return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)


def ema_decay(step: int, ceiling: float) -> float:
    """Return the decay of the evaluation average after optimizer step `step`, counted from 1."""
    return min((1 + step) / (10 + step), ceiling)


def local_part(whole: Tensor, parameter: Any) -> Tensor:
    """Return this process's part of a tensor that ZeRO-3 shards like `parameter`, with the same padding."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    padded = F.pad(whole.flatten(), (0, size * torch.distributed.get_world_size() - whole.numel()))
    return padded[rank * size : (rank + 1) * size]


class Policy:
    """Adapters on `network`, in float32 whatever the network's own number format.

    `old_is_current` tells whether the two adapters hold the same numbers, so that one forward pass serves for both.
    """

    def __init__(self, network: Any, rank: int, alpha: int, targets: list[str], seed: int, *, init: str = "gaussian"):
        self.network, self.rank, self.alpha = network, rank, alpha
        layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in layers):
                known = sorted({".".join(name.split(".")[2:]) for name in layers if "blocks." in name})
                raise InputError(f"lora.targets names {target}, but no layer has that name: {nearest(target, known)}")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
            torch.manual_seed(randomness.at(seed, randomness.ADAPTERS).initial_seed())
            for name in ADAPTERS:
                weights = "gaussian" if init == "gaussian" else True  # True is PEFT's name for kaiming
                config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=weights, target_modules=list(targets))
                config._register_custom_module({nn.Linear: AdaptedLinear})
                network.add_adapter(config, adapter_name=name)
        self.layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, AdaptedLinear)}
        for name in ADAPTERS:
            for parameter in self.tensors(name).values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(name == "current")
        self._changed: set[str] = set()  # adapters whose copies in the network's format are out of date
        self.copy("current", "old")
        self.copy("current", "ema")
        self.old_is_current = True
        self._activate("current")

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """Return the adapter's matrices by layer name, in a fixed order: LAYER.lora_A and LAYER.lora_B."""
        matrices = {}
        for name, layer in self.layers.items():
            matrices[f"{name}.lora_A"] = layer.lora_A[adapter].weight
            matrices[f"{name}.lora_B"] = layer.lora_B[adapter].weight
        return matrices

    def _held(self, adapter: str) -> list[Tensor]:
        """Return what this process holds of the adapter's matrices: all, or under ZeRO-3 its part of each."""
        return [getattr(matrix, "ds_tensor", matrix) for matrix in self.tensors(adapter).values()]

    def whole(self, adapter: str) -> dict[str, Tensor]:
        """Return the adapter's matrices by layer name; all processes gather them together where they are sharded."""
        matrices = self.tensors(adapter)
        if not hasattr(next(iter(matrices.values())), "ds_tensor"):
            return {key: matrix.detach() for key, matrix in matrices.items()}
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(matrices.values())):
            return {key: matrix.detach().clone() for key, matrix in matrices.items()}

    def scaling(self) -> dict[str, float]:
        """Return the factor that each layer multiplies B A by."""
        return {name: layer.scaling["current"] for name, layer in self.layers.items()}

    @torch.no_grad()
    def start_from(self, tensors: dict[str, Tensor]) -> None:
        """Initialise all adapters from a LoRA file's matrices, B with the scale folded in, as `read_lora` returns them.

        Raises InputError where their layers or their rank differ from this policy's.
        """
        matrices, scaling = self.tensors("current"), self.scaling()
        different = sorted(matrices.keys() ^ tensors.keys())
        if different:
            side = "the policy" if different[0] in matrices else "lora.start"
            raise InputError(
                f"lora.start and lora.targets differ in {len(different)} matrices: only {side} has {different[0]}; "
                "set lora.targets to the layers of the file"
            )
        for key, matrix in matrices.items():
            layer, part = key.rsplit(".", 1)
            if tensors[key].shape != matrix.shape:
                given, needed = tuple(tensors[key].shape), tuple(matrix.shape)
                raise InputError(f"lora.start has {key} of shape {given}, not {needed}: set lora.rank to the file's")
            matrix.copy_(tensors[key] / scaling[layer] if part == "lora_B" else tensors[key])
        self.copy("current", "old")
        self.copy("current", "ema")

    @property
    def active(self) -> str | None:
        """The adapter that the network runs with now; None is the base model."""
        return self._active

    def _activate(self, adapter: str | None) -> None:
        self._active = adapter
        if adapter in self._changed:
            self._refresh(adapter)
        for layer in self.layers.values():
            layer.activate(adapter)

    @torch.no_grad()
    def _refresh(self, adapter: str) -> None:
        """Copy an adapter that does not train into its layers' number format, where that is not the masters' own.

        ZeRO-3 gathers the masters layer by layer and needs no copies.
        """
        copies, masters = [], []
        for layer in self.layers.values():
            dtype = layer.base_layer.weight.dtype
            for matrix in (layer.lora_A[adapter], layer.lora_B[adapter]):
                if hasattr(matrix.weight, "ds_tensor") or matrix.weight.dtype == dtype:
                    continue
                if matrix.product is None:
                    matrix.product = torch.empty_like(matrix.weight, dtype=dtype)
                copies.append(matrix.product)
                masters.append(matrix.weight)
        if copies:
            torch._foreach_copy_(copies, masters)
        self._changed.discard(adapter)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Run the network with one adapter, or with none (the reference)."""
        self._activate(adapter)
        try:
            yield
        finally:
            self._activate("current")

    @torch.no_grad()
    def blend(self, target: str, decay: float) -> None:
        """target <- decay target + (1 - decay) current."""
        torch._foreach_lerp_(self._held(target), self._held("current"), 1 - decay)
        self._changed.add(target)

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """target <- source, bit for bit."""
        torch._foreach_copy_(self._held(target), self._held(source))
        self._changed.add(target)

    def after_update(self, step: int, ceiling: float) -> None:
        """Record that `current` moved in optimizer step `step`, counted from 1, and let the average follow."""
        self.old_is_current = False
        self.blend("ema", ema_decay(step, ceiling))

    def after_epoch(self, schedule: int, step: int) -> None:
        """Let the old policy follow: old <- d old + (1 - d) current (DiffusionNFT, section 3.4)."""
        decay = old_decay(schedule, step)
        if decay == 0:
            self.copy("current", "old")
        else:
            self.blend("old", decay)
        self.old_is_current = decay == 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return all adapters' matrices under ADAPTER/LAYER.lora_X."""
        return {f"{name}/{key}": matrix for name in ADAPTERS for key, matrix in self.whole(name).items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore all adapters' matrices. Raises InputError where names or shapes differ."""
        matrices: dict[str, Any] = {f"{name}/{key}": m for name in ADAPTERS for key, m in self.tensors(name).items()}
        shapes = {key: getattr(matrix, "ds_shape", matrix.shape) for key, matrix in matrices.items()}
        if shapes != {key: tensor.shape for key, tensor in state.items()}:
            raise InputError("the checkpoint's adapters have another rank, other layers or another model")
        for key, matrix in matrices.items():
            if hasattr(matrix, "ds_tensor"):
                matrix.ds_tensor.copy_(local_part(state[key].to(matrix.ds_tensor), matrix))
            else:
                matrix.copy_(state[key])
        self._changed = {"old", "ema"}
