"""The dispatch mode: operations on the device run on fake tensors, all others really."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.fake_cuda.watch import Fault, Watch

aten = torch.ops.aten
LARGEST_FLASH_HEAD = 256
# What multiplies matrices, and how many of its first arguments are factors (the rest are biases and options).
PRODUCTS = {
    aten.mm: 2,
    aten.bmm: 2,
    aten.mv: 2,
    aten.dot: 2,
    aten.addmm: 3,
    aten.addmv: 3,
    aten.baddbmm: 3,
    aten.convolution: 3,
    aten.convolution_backward: 3,
    aten._scaled_dot_product_flash_attention: 3,
    aten._scaled_dot_product_flash_attention_backward: 4,
    aten._scaled_dot_product_efficient_attention: 3,
    aten._scaled_dot_product_efficient_attention_backward: 4,
}
COPIES = (aten._to_copy.default, aten.copy_.default)
COUNTED = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default)


def plausible(shape: Any, dtype: torch.dtype) -> Tensor:
    """Return values for a tensor that has none: true, 0, or spread over (0, 1), the same for each shape."""
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    count = torch.Size(shape).numel()
    return (torch.arange(1, count + 1, dtype=torch.float64) * 0.6180339887 % 1).to(dtype).view(shape)


def on_device(value: Any) -> bool:
    return isinstance(value, FakeTensor)


class FakeCuda(TorchDispatchMode):
    """Runs everything; `watch` is told of memory and faults. Raises Fault for what could not run on a real device."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        leaves = tree_leaves((arguments, named)) if named else tree_leaves(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        target = named.get("device")
        to_device = target is not None and torch.device(target).type == "cuda"
        if not to_device and not any(map(on_device, tensors)):
            return function(*arguments, **named)
        if function in COPIES and (crossed := self._cross(function, arguments, named)) is not None:
            return crossed
        if function is aten._local_scalar_dense.default:
            self.watch.synchronised("its value is asked for")
            return plausible((1,), arguments[0].dtype).item()
        if function is aten.equal.default:
            self.watch.synchronised("two tensors are compared")
            return True
        if function in COUNTED or self._check_indices(function, tensors):
            self.watch.synchronised(f"the size of what {function.overloadpacket.__name__} returns is asked for")
            return self._with_values(function, arguments, named)
        self._check_product(function, arguments, tensors)
        with self.fake:
            result = function(*arguments, **named)
        self._count(result, tensors)
        return result

    def _cross(self, function: Any, arguments: tuple, named: dict) -> Any:
        """Copy between the device and the processor; None where the copy stays on the device."""
        if function is aten._to_copy.default:
            source, target = arguments[0], torch.device(named.get("device") or arguments[0].device)
            waits = not named.get("non_blocking", False)
            dtype = named.get("dtype") or source.dtype
        else:
            destination, source = arguments[:2]
            target, dtype = destination.device, destination.dtype
            waits = not (arguments[2] if len(arguments) > 2 else named.get("non_blocking", False))
        if on_device(source) == (target.type == "cuda"):
            return None
        if on_device(source):
            self.watch.synchronised("a copy to the CPU")
            if function is aten.copy_.default:
                return destination.copy_(plausible(source.shape, source.dtype))
            return plausible(source.shape, dtype)
        if source.device.type != "meta" and (waits or not getattr(source, "pinned_stand_in", False)):
            self.watch.synchronised("a copy from the CPU that waits (not pinned, or blocking)")
        if function is aten.copy_.default:
            return destination
        strides = torch.empty_like(source, device="meta").stride()
        with self.fake:
            # Weights lie on the meta device before they come here.
            result = torch.empty_strided(source.shape, strides, dtype=dtype, device=target)
        self.watch.created(result)
        return result

    def _with_values(self, function: Any, arguments: tuple, named: dict) -> Any:
        """Run an operation whose result's size depends on values, on plausible ones."""
        arguments, named = tree_map_only(FakeTensor, lambda t: plausible(t.shape, t.dtype), (arguments, named))
        result = function(*arguments, **named)
        with self.fake:
            result = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="cuda:0"), result)
        self._count(result, [])
        return result

    def _check_indices(self, function: Any, tensors: list[Tensor]) -> bool:
        """Notice indices on the CPU, which are copied, and return whether a mask selects what the operation returns."""
        name = function.overloadpacket.__name__
        if "index" not in name:
            return False
        for tensor in tensors:
            if not on_device(tensor) and tensor.ndim and tensor.dtype in (torch.long, torch.int, torch.bool):
                self.watch.synchronised("an index on the CPU is copied")
        masks = any(tensor.dtype == torch.bool for tensor in tensors)
        if masks and name != "index":
            self.watch.synchronised("a mask as index is counted")
        return masks and name == "index"

    def _check_product(self, function: Any, arguments: tuple, tensors: list[Tensor]) -> None:
        """Refuse a product of different number formats, and notice a float32 product where none is meant."""
        factors = PRODUCTS.get(function.overloadpacket)
        if factors is None:
            return
        given = [tensor for tensor in arguments[:factors] if isinstance(tensor, Tensor)]
        formats = {tensor.dtype for tensor in given}
        name = function.overloadpacket.__name__
        if len(formats) > 1:
            raise Fault(f"{name} of different number formats: {', '.join(str(tensor.dtype) for tensor in given)}")
        if formats == {torch.float32} and not any(map(self._meant, given)):
            shapes = " x ".join(str(tuple(tensor.shape)) for tensor in given)
            self.watch.float32_product(f"{name} {shapes}")

    def _meant(self, tensor: Tensor) -> bool:
        return on_device(tensor) and tensor.untyped_storage()._cdata in self.watch.meant

    def _count(self, result: Any, tensors: list[Tensor]) -> None:
        """Count the storages of the results; float32 that comes from what is meant to be float32 is meant too."""
        meant = any(tensor.dtype == torch.float32 and self._meant(tensor) for tensor in tensors)
        for tensor in tree_leaves(result):
            if on_device(tensor):
                key = self.watch.created(tensor)
                if meant and tensor.dtype == torch.float32:
                    self.watch.meant.add(key)


_unfused = F.scaled_dot_product_attention


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more
) -> Tensor:
    """Attention by the kernels that torch chooses on a CUDA device: flash, or for float32 and masks the efficient one.

    Without CUDA, torch takes the unfused path, which materialises all attention scores.
    """
    if not on_device(query):
        return _unfused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        raise Fault(f"attention of different number formats: {query.dtype}, {key.dtype}, {value.dtype}")
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and attn_mask is None and query.shape[-1] <= LARGEST_FLASH_HEAD:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, keep, dropout_p, is_causal, scale=scale
    )[0]


def _pinned(tensor: Tensor, *_, **__) -> Tensor:
    copied = tensor.clone()
    copied.pinned_stand_in = True  # type: ignore[attr-defined]
    return copied


_kernels = torch.library.Library("aten", "IMPL")


def _kernel(*_: Any) -> None:
    raise AssertionError("an operation on the device was not seen")


def install() -> None:
    """Replace what cannot be seen by a dispatch mode: the choice of kernels, and pinned memory.

    SiLU's backward pass is one kernel on CUDA. A device for which no such kernel is registered takes it apart.
    """
    _kernels.impl("silu_backward", _kernel, "CUDA")
    F.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention = fused_attention
    Tensor.pin_memory = _pinned  # type: ignore[method-assign,assignment]
    Tensor.is_pinned = lambda tensor, *_: getattr(tensor, "pinned_stand_in", False)  # type: ignore[method-assign]
