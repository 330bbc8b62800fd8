"""A run's adapters as files that people use, each verified on what is read back from disk before it gets its name."""

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

WRONG = "the export is wrong and was removed"


def write_peft(folder: Path, trained: Trained, dtype: torch.dtype) -> None:
    """Write adapter_config.json and adapter_model.safetensors, B as trained and alpha beside it, as PEFT reads them."""
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
    """The base transformer's tensors one at a time, as they are stored. Raises InputError where one cannot be read."""
    model = trained.recipe.model.path
    try:
        yield from read_weights(locate(model, ("transformer/*",)) / "transformer", names)
    except (OSError, KeyError, SafetensorError) as error:
        raise InputError(f"the transformer of {model} cannot be read: {str(error).splitlines()[0]}") from None


def write_merged(folder: Path, trained: Trained, dtype: torch.dtype) -> None:
    """Write the whole transformer with the deltas added in float32 before the cast, one tensor at a time in memory
    beside the result. Raises InputError where the base cannot be read."""
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


def _hollow(trained: Trained, dtype: torch.dtype) -> Any:
    """A transformer whose linear layers lie on the CPU without taking memory, for adapters to be loaded onto."""
    with torch.device("meta"):
        network = trained.family.transformer.from_config(trained.config)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            shared = torch.zeros((), dtype=dtype, device="cpu").expand(layer.weight.shape)
            layer.weight = nn.Parameter(shared, requires_grad=False)
    return network


class _Deviation:
    """How far all deltas together lie from the trained ones, as a share of their size."""

    def __init__(self):
        self.error, self.size = 0.0, 0.0

    def add(self, difference: Tensor, expected: Tensor) -> None:
        self.error += float(difference.square().sum())
        self.size += float(expected.square().sum())

    def share(self) -> float:
        return math.sqrt(self.error / self.size) if self.error else 0.0


def _check(layer: str, found: Tensor, expected: Tensor, allowed: Tensor) -> None:
    """Raise InputError where an entry of a delta is further from the trained one than `allowed`, or not finite."""
    difference = (found - expected).abs()
    if not bool((difference <= 1.01 * allowed).all()):
        raise InputError(
            f"{WRONG}: read back, the delta of {layer} is off by up to {float(difference.max()):.3g} where "
            f"{float(expected.abs().max()):.3g} is its largest entry"
        )


def _rounding(dtype: torch.dtype) -> tuple[float, float]:
    """What rounding to `dtype` may change: a share of a number, and the spacing of the smallest ones."""
    limits = torch.finfo(dtype)
    return limits.eps / 2, limits.smallest_normal * limits.eps


def _check_layers(trained: Trained, layers: dict[str, Any]) -> None:
    if layers.keys() != trained.scaling.keys():
        raise InputError(f"{WRONG}: read back, it adapts {len(layers)} layers, the policy {len(trained.scaling)}")


def verify_adapters(folder: Path, trained: Trained, dtype: torch.dtype, kind: str) -> float:
    """Load what was written through diffusers (or PEFT) onto an empty transformer of the base's configuration.

    Returns the deviation of all deltas, as a share of their size. Raises InputError where the layers are not the
    policy's, or an entry of a delta is further from the trained alpha / rank * B A than rounding to `dtype` explains.
    """
    network = _hollow(trained, dtype)
    if kind == "comfyui":
        layers = attach_lora(network, folder / LORA_NAME)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of keys that do not fit: the layers are compared below
                model = PeftModel.from_pretrained(
                    network, str(folder), torch_device="cpu", autocast_adapter_dtype=False
                )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise InputError(f"{WRONG}: PEFT cannot read it ({error})") from None
        named = model.base_model.model.named_modules()
        layers = {name: layer for name, layer in named if isinstance(layer, LoraLayer)}
    _check_layers(trained, layers)
    deviation, (unit, least) = _Deviation(), _rounding(dtype)
    fold = torch.finfo(torch.float32).eps  # the scale is folded into B in float32
    for name, layer in layers.items():
        (adapter,) = layer.lora_A
        product = layer.lora_B[adapter].weight.detach().double() @ layer.lora_A[adapter].weight.detach().double()
        found, (a, b) = layer.scaling[adapter] * product, trained.factors(name)
        expected, off_a, off_b = b @ a, unit * a.abs() + least, (unit + fold) * b.abs() + least
        _check(name, found, expected, b.abs() @ off_a + off_b @ (a.abs() + off_a))
        deviation.add(found - expected, expected)
    return deviation.share()


def verify_merged(folder: Path, trained: Trained, dtype: torch.dtype) -> float:
    """As `verify_adapters`, for a whole transformer: adapted weights hold their deltas, all others are the base's.

    The deviation is that from the base in `dtype`: rounding the sum may swallow a good part of a small delta.
    """
    try:
        written = trained.family.transformer.from_pretrained(folder, dtype=dtype, use_safetensors=True).state_dict()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        told = str(error).splitlines()[0]
        raise InputError(f"{WRONG}: diffusers cannot read it ({told})") from None
    deviation, (unit, least) = _Deviation(), _rounding(dtype)
    single = torch.finfo(torch.float32).eps  # the product and the sum are made in float32
    for name, weight in _base_weights(trained, list(written)):
        layer, cast = name.removesuffix(".weight"), weight.to(dtype)
        if layer in trained.scaling:
            found, base = written[name].double(), weight.double()
            a, b = trained.factors(layer)
            expected = b @ a
            summed = (unit + single) * (base + expected).abs() + a.shape[0] * single * (b.abs() @ a.abs()) + least
            _check(layer, found - base, expected, summed)
            deviation.add(found - cast.double() - expected, expected)
        elif not torch.equal(written[name], cast):
            raise InputError(f"{WRONG}: read back, {name} is not the base's")
    return deviation.share()


def check_destination(out: Path, replace: bool) -> None:
    """Raise InputError where `out` is taken, unless by an earlier export that is to be replaced."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not is_our_card(out / "README.md"):
        raise InputError(f"{out} exists and is no export of ours: it is left as it is; give another --out")
    if out.exists() and not replace:
        raise InputError(f"{out} exists; add --replace to write it anew, or give another --out")


def _write(folder: Path, trained: Trained, kind: str, dtype: torch.dtype, texts: Texts) -> float:
    """Write the weights and read them back; returns the deviation of their deltas."""
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
    """Write `out`: weights as `kind`, one of FORMATS, in `dtype` (by default float32, merged the base's), with a card.

    Returns the number of layers and the deviation of their deltas. Raises InputError, and leaves nothing, where `out`
    is taken or cannot be written, or what was written does not verify.
    """
    one_of("--format", kind, FORMATS)
    dtype = dtype or (trained.recipe.model.dtype if kind == "merged" else "float32")
    one_of("--dtype", dtype, DTYPES)
    number = getattr(torch, dtype)
    check_destination(out, replace)
    try:
        with staged(out) as folder:
            folder.mkdir()
            deviation = _write(folder, trained, kind, number, texts)
            write_card(folder, trained, texts, kind=kind, dtype=dtype, deviation=deviation)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    return len(trained.scaling), deviation
