"""What the share of a device's peak refers to."""

import pytest
import torch

from stitchvm_reward.peaks import fastest, listed_peak, peak_teraflops


def test_every_version_of_a_card_has_its_own_peak():
    names = {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.5,
        "NVIDIA H100 NVL": 835.5,
        "NVIDIA H200": 989.4,
        "NVIDIA H200 NVL": 835.5,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "A100-SXM4-40GB": 312.0,
        "NVIDIA L40S": 362.0,
        "NVIDIA GeForce RTX 4090": 165.2,
        "NVIDIA GeForce RTX 5090": 209.5,
    }
    assert {name: listed_peak(name) for name in names} == names


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA L40",
    ],
)
def test_a_slower_relative_of_a_listed_card_is_measured(name):
    assert listed_peak(name) is None


def test_the_product_grows_until_it_is_no_faster():
    tried = []

    def rate(side):
        tried.append(side)
        return 900.0 * side / (side + 200)  # half of the time is overhead at side 200

    peak, side = fastest(rate, 256, 32768)
    assert peak > 870 and side == tried[-1] == 8192 and tried == [256, 512, 1024, 2048, 4096, 8192]
    assert fastest(rate, 256, 512)[1] == 512  # or until there is no memory for more


def test_float32_is_not_compared_with_the_bf16_peak(monkeypatch):
    monkeypatch.setattr("stitchvm_reward.peaks.measured_peak", lambda device, dtype: (50.0, 8192))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    device = torch.device("cuda")
    assert peak_teraflops(device, torch.float32) == (50.0, "a 8192 x 8192 product on this device")
    assert peak_teraflops(device, torch.bfloat16) == (756.5, "data sheet of the NVIDIA H100 PCIe, dense bf16")
