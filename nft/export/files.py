"""A run's adapters as files that people use, each read back from disk and verified before it gets its name."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from nft.export.card import FORMATS, Texts, is_our_card, write_card
from nft.export.lora import LORA_NAME, attach_lora, lora_header, save_lora
from nft.export.trained import Trained
from stitchvm_reward.diffusion.backbone import read_weights
from stitchvm_reward.errors import InputError
from stitchvm_reward.files import staged
from stitchvm_reward.hub import locate
from stitchvm_reward.runs.recipe import DTYPES, one_of
from stitchvm_reward.secrets import refuse_secrets

WRONG = "the export is wrong and was removed"


def write_peft(folder: Path, trained: Trained, dtype: torch.dtype) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them: B as trained, and alpha beside it."""
    lora = trained.recipe.lora
    layers = sorted(trained.scaling)
    LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=layers,
        base_model_name_or_path=trained.recipe.model.path,
        inference_mode=True,
    ).save_pretrained(folder)
    tensors = {
        f"base_model.model.{key}.weight": matrix.to(dtype).contiguous() for key, matrix in trained.matrices.items()
    }
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def _base_weights(trained: Trained, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the base transformer's tensors one at a time, as stored. Raises InputError where one cannot be read."""
    model = trained.recipe.model.path
    try:
        yield from read_weights(locate(model, ("transformer/*",)) / "transformer", names)
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"the transformer of {model} cannot be read: {str(error).splitlines()[0]}") from None


def write_merged(folder: Path, trained: Trained, dtype: torch.dtype) -> None:
    """Write the whole transformer with the deltas added in float32 before the cast.

    Beside the result, one tensor of the base at a time is in memory. Raises InputError where the base cannot be read.
    """
    with torch.device("meta"):
        network = trained.family.transformer.from_config(trained.config)
    merged = {}
    for name, weight in _base_weights(trained, list(network.state_dict())):
        layer = name.removesuffix(".weight")
        if layer in trained.scaling:
            a, b = trained.matrices[f"{layer}.lora_A"], trained.matrices[f"{layer}.lora_B"]
            weight = weight.float() + trained.scaling[layer] * (b @ a)
        merged[name] = weight.to(dtype)
    network.load_state_dict(merged, assign=True)
    network.save_pretrained(folder, safe_serialization=True)


def _empty_network(trained: Trained, dtype: torch.dtype) -> Any:
    """Return a transformer to load adapters onto, whose linear layers are on the CPU without using memory."""
    with torch.device("meta"):
        network = trained.family.transformer.from_config(trained.config)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            shared = torch.zeros((), dtype=dtype, device="cpu").expand(layer.weight.shape)
            layer.weight = nn.Parameter(shared, requires_grad=False)
    return network


class _Deviation:
    """The norm of the error of all deltas together, relative to the norm of the trained deltas."""

    def __init__(self):
        self.error, self.size = 0.0, 0.0

    def add(self, difference: Tensor, expected: Tensor) -> None:
        self.error += float(difference.square().sum())
        self.size += float(expected.square().sum())

    def relative(self) -> float:
        return math.sqrt(self.error / self.size) if self.error else 0.0


def _check(layer: str, result: Tensor, expected: Tensor, allowed: Tensor) -> None:
    """Raise InputError where an entry of a delta is not finite or is off by more than `allowed`."""
    difference = (result - expected).abs()
    if not bool((difference <= 1.01 * allowed).all()):
        raise InputError(
            f"{WRONG}: read back, the delta of {layer} is off by up to {float(difference.max()):.3g} where "
            f"{float(expected.abs().max()):.3g} is its largest entry"
        )


def _rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest errors of rounding to `dtype`: relative to a number, and absolute for the smallest numbers."""
    limits = torch.finfo(dtype)
    return limits.eps / 2, limits.smallest_normal * limits.eps


def _check_layers(trained: Trained, layers: dict[str, Any]) -> None:
    if layers.keys() != trained.scaling.keys():
        raise InputError(f"{WRONG}: read back, it adapts {len(layers)} layers, the policy {len(trained.scaling)}")


def _peft_layers(network: Any, folder: Path) -> dict[str, Any]:
    """Load an adapter folder through PEFT and return the adapted layers by name. Raises InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about keys that do not fit: the caller compares the layers
            model = PeftModel.from_pretrained(network, str(folder), torch_device="cpu", autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"{WRONG}: PEFT cannot read it ({error})") from None
    named = model.base_model.model.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, LoraLayer)}


def verify_adapters(folder: Path, trained: Trained, dtype: torch.dtype, kind: str) -> float:
    """Load the written adapters through diffusers (or PEFT) onto an empty transformer of the base's configuration.

    Returns the relative deviation of all deltas. Raises InputError where the layers are not the policy's, or an entry
    of a delta differs from the trained alpha / rank * B A by more than rounding to `dtype` explains.
    """
    network = _empty_network(trained, dtype)
    layers = attach_lora(network, folder / LORA_NAME) if kind == "comfyui" else _peft_layers(network, folder)
    _check_layers(trained, layers)
    deviation, (unit, least) = _Deviation(), _rounding(dtype)
    fold = torch.finfo(torch.float32).eps  # the scale is folded into B in float32
    for name, layer in layers.items():
        (adapter,) = layer.lora_A
        product = layer.lora_B[adapter].weight.detach().double() @ layer.lora_A[adapter].weight.detach().double()
        result, (a, b) = layer.scaling[adapter] * product, trained.factors(name)
        expected, error_a, error_b = b @ a, unit * a.abs() + least, (unit + fold) * b.abs() + least
        _check(name, result, expected, b.abs() @ error_a + error_b @ (a.abs() + error_a))
        deviation.add(result - expected, expected)
    return deviation.relative()


def verify_merged(folder: Path, trained: Trained, dtype: torch.dtype) -> float:
    """Verify a whole transformer as `verify_adapters` does: adapted weights hold their deltas, others are the base's.

    The deviation is measured against the base in `dtype`: rounding the sum may lose a large part of a small delta.
    """
    try:
        written = trained.family.transformer.from_pretrained(folder, dtype=dtype, use_safetensors=True).state_dict()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{WRONG}: diffusers cannot read it ({reason})") from None
    deviation, (unit, least) = _Deviation(), _rounding(dtype)
    single = torch.finfo(torch.float32).eps  # the product and the sum are computed in float32
    for name, weight in _base_weights(trained, list(written)):
        layer, cast = name.removesuffix(".weight"), weight.to(dtype)
        if layer in trained.scaling:
            result, base = written[name].double(), weight.double()
            a, b = trained.factors(layer)
            expected = b @ a
            allowed = (unit + single) * (base + expected).abs() + a.shape[0] * single * (b.abs() @ a.abs()) + least
            _check(layer, result - base, expected, allowed)
            deviation.add(result - cast.double() - expected, expected)
        elif not torch.equal(written[name], cast):
            raise InputError(f"{WRONG}: read back, {name} is not the base's")
    return deviation.relative()


def check_destination(out: Path, replace: bool) -> None:
    """Raise InputError where `out` exists, unless it is an earlier export that may be replaced."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not is_our_card(out / "README.md"):
        raise InputError(f"{out} exists and is no export of ours: it is left as it is; give another --out")
    if out.exists() and not replace:
        raise InputError(f"{out} exists; add --replace to overwrite it, or give another --out")


def _write(folder: Path, trained: Trained, kind: str, dtype: torch.dtype, texts: Texts) -> float:
    """Write the weights, read them back and return the deviation of their deltas."""
    if kind == "merged":
        write_merged(folder / "transformer", trained, dtype)
        return verify_merged(folder / "transformer", trained, dtype)
    if kind == "comfyui":
        header = lora_header(
            trained.recipe,
            trained.config,
            trained.epoch,
            trained.date,
            title=texts.title,
            license_name=texts.license,
            author=texts.author,
        )
        save_lora(folder / LORA_NAME, trained.matrices, trained.scaling, header, dtype)
    else:
        write_peft(folder, trained, dtype)
    return verify_adapters(folder, trained, dtype, kind)


def export(
    trained: Trained, kind: str, dtype: str | None, out: Path, texts: Texts, *, replace: bool = False
) -> tuple[int, float]:
    """Write the folder `out`: weights as `kind`, one of FORMATS, in `dtype`, and a card.

    `dtype` is by default float32, and for merged weights that of the base. Returns the number of layers and the
    deviation of their deltas. Raises InputError, and leaves no file, where `out` exists or cannot be written, or the
    files do not verify.
    """
    one_of("--format", kind, FORMATS)
    dtype = dtype or (trained.recipe.model.dtype if kind == "merged" else "float32")
    one_of("--dtype", dtype, DTYPES)
    check_destination(out, replace)
    for name, given in (("title", texts.title), ("author", texts.author), ("license", texts.license)):
        refuse_secrets(given or "", f"--{name}")
    try:
        with staged(out) as folder:
            folder.mkdir()
            deviation = _write(folder, trained, kind, getattr(torch, dtype), texts)
            write_card(folder, trained, texts, kind=kind, dtype=dtype, deviation=deviation)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    return len(trained.scaling), deviation
