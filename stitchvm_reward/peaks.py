"""The TFLOP/s that a device can reach at most: what shares of its peak refer to."""

from collections.abc import Callable

import torch

from stitchvm_reward.measure import timed

# Dense bf16 TFLOP/s with float32 accumulation, by the name that the driver reports: laptop, partitioned and export
# versions of a card are slower. From NVIDIA's data sheets (H100, H200, A100, L40S, HGX B200), which give twice as much
# "with sparsity", and from the architecture white papers of the GeForce cards (GA102, Ada, RTX Blackwell).
PEAKS = {
    "H100 80GB HBM3": 989.4,  # SXM
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "GH200 480GB": 989.4,
    "B200": 2250.0,
    "A100-SXM4-40GB": 312.0,
    "A100-SXM4-80GB": 312.0,
    "A100-PCIE-40GB": 312.0,
    "A100 80GB PCIe": 312.0,
    "L40S": 362.0,
    "GeForce RTX 3090": 71.0,
    "GeForce RTX 4090": 165.2,
    "GeForce RTX 5090": 209.5,
}
HALF = (torch.bfloat16, torch.float16)  # formats that PEAKS hold for
FIRST, LAST = {"cuda": 4096, "cpu": 1024}, {"cuda": 32768, "cpu": 2048}  # sides of the products that are tried
GAIN = 1.03  # a larger product that is no faster than this ends the search


def listed_peak(name: str) -> float | None:
    """Return the dense bf16 TFLOP/s of a device by its name, or None for one that is not listed."""
    return PEAKS.get(name.removeprefix("NVIDIA "))


def fastest(rate: Callable[[int], float], first: int, last: int) -> tuple[float, int]:
    """Double the side of a square product from `first` to `last` for as long as `rate` rises: highest rate, its side.

    A small product is dominated by its launch and its memory traffic, and would understate the peak.
    """
    best, side = rate(first), first
    while 2 * side <= last:
        larger = rate(2 * side)
        if larger <= GAIN * best:
            return max(best, larger), side if best >= larger else 2 * side
        best, side = larger, 2 * side
    return best, side


def measured_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """Return the TFLOP/s of a product that is large enough on this device, and its side."""

    def rate(side: int) -> float:
        a = torch.randn(side, side, device=device, dtype=dtype)
        result = timed(lambda: a @ a, 1, device, 3)
        return 2 * side**3 / 1e9 / float(result["milliseconds"] or 1)

    return fastest(rate, FIRST[device.type], LAST[device.type])


def peak_teraflops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the TFLOP/s that shares refer to, and where the number comes from: the data sheet or a measurement."""
    if device.type == "cuda" and dtype in HALF:
        name = torch.cuda.get_device_name(device)
        if (peak := listed_peak(name)) is not None:
            return peak, f"data sheet of the {name}, dense bf16"
    peak, side = measured_peak(device, dtype)
    return peak, f"a {side} x {side} product on this device"
