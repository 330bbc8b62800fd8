"""One planted example of each fault; `python -m tests.fake_cuda.planted` prints what is found of each as JSON."""

import json
import sys
from collections.abc import Callable
from typing import Any

from tests.fake_cuda.device import GIB, preload, pretend

DEVICE = "cuda:0"


def mixed_devices(torch: Any) -> None:
    torch.ones(4, 4, device=DEVICE) @ torch.ones(4, 4)


def mixed_formats(torch: Any) -> None:
    torch.ones(4, 4, device=DEVICE) @ torch.ones(4, 4, device=DEVICE, dtype=torch.bfloat16)


def mixed_formats_in_a_convolution(torch: Any) -> None:
    torch.nn.Conv2d(3, 4, 1).to(DEVICE)(torch.ones(1, 3, 8, 8, device=DEVICE, dtype=torch.bfloat16))


def mixed_formats_in_attention(torch: Any) -> None:
    query = torch.ones(1, 2, 4, 8, device=DEVICE)
    torch.nn.functional.scaled_dot_product_attention(query, query.bfloat16(), query.bfloat16())


def value(torch: Any) -> None:
    float(torch.ones(3, device=DEVICE).sum())


def truth(torch: Any) -> None:
    assert torch.ones(3, device=DEVICE).isfinite().all()


def values(torch: Any) -> None:
    torch.ones(3, device=DEVICE).tolist()


def copy_to_the_cpu(torch: Any) -> None:
    torch.ones(3, device=DEVICE).to("cpu")


def copy_into_the_cpu(torch: Any) -> None:
    torch.ones(3).copy_(torch.ones(3, device=DEVICE))


def copy_from_the_cpu(torch: Any) -> None:
    torch.ones(3).to(DEVICE)


def copy_of_a_list(torch: Any) -> None:
    torch.tensor([1.0, 2.0], device=DEVICE)


def unpinned_copy(torch: Any) -> None:
    torch.ones(3).to(DEVICE, non_blocking=True)


def index_of_a_list(torch: Any) -> None:
    torch.ones(3, device=DEVICE)[[0, 2]]


def index_by_a_mask(torch: Any) -> None:
    numbers = torch.ones(3, device=DEVICE)
    numbers[numbers > 0]


def nonzero(torch: Any) -> None:
    torch.ones(3, device=DEVICE).nonzero()


def waiting(torch: Any) -> None:
    torch.cuda.current_stream().synchronize()


def nothing_to_wait_for(torch: Any) -> None:
    numbers = torch.ones(4).pin_memory().to(DEVICE, non_blocking=True)
    rows = torch.zeros(2, dtype=torch.long, device=DEVICE)
    (numbers[rows] * torch.full((2,), 0.5, device=DEVICE)).sum()
    assert numbers[1:].shape == (3,) and (torch.ones(3) + 1).tolist() == [2, 2, 2]


def float32_product(torch: Any) -> None:
    weight = torch.ones(4, 4, device=DEVICE, dtype=torch.bfloat16)
    weight @ weight
    weight.float() @ weight.float()


def float32_backward(torch: Any) -> None:
    layer = torch.nn.Linear(4, 4, device=DEVICE)
    layer(torch.ones(2, 4, device=DEVICE)).sum().backward()


def float32_attention(torch: Any) -> None:
    query = torch.ones(1, 2, 4, 8, device=DEVICE)
    torch.nn.functional.scaled_dot_product_attention(query, query, query)


SYNCHRONISED = (
    value,
    truth,
    values,
    copy_to_the_cpu,
    copy_into_the_cpu,
    copy_from_the_cpu,
    copy_of_a_list,
    unpinned_copy,
    index_of_a_list,
    index_by_a_mask,
    nonzero,
    waiting,
)
IMPOSSIBLE = (mixed_devices, mixed_formats, mixed_formats_in_a_convolution, mixed_formats_in_attention)
PRODUCTS = (float32_product, float32_backward, float32_attention)
HARMLESS = (nothing_to_wait_for,)


def peaks(torch: Any, watch: Any) -> dict[str, float]:
    """Return peaks in MiB that can be told in advance."""

    def peak(run: Callable[[], object]) -> float:
        before = watch.live
        with watch.phase(run.__name__):
            run()
        assert watch.live == before, f"{run.__name__} left something behind"
        return (watch.peaks[run.__name__] - before) / 2**20

    def mib(count: int = 1, **options: Any) -> Any:
        return torch.zeros(count, 2**18, device=DEVICE, **options)

    def one_after_the_other() -> None:
        for _ in range(3):
            mib(2)

    def views() -> None:
        mib(2).view(-1)[:5].unsqueeze(0)

    def chain() -> None:
        mib().exp().exp()  # inputs are gone when the next result is there

    def saved_for_the_backward_pass() -> None:
        mib(requires_grad=True).exp().exp().sum().backward()

    runs = (one_after_the_other, views, chain, saved_for_the_backward_pass)
    return {run.__name__: peak(run) for run in runs}


def main() -> int:
    preload()
    import torch

    from tests.fake_cuda import mode
    from tests.fake_cuda.watch import Fault, Watch

    watch = Watch()
    pretend(watch.synchronised, 80 * GIB)
    mode.install()
    found: dict[str, Any] = {}
    with mode.FakeCuda(watch):
        for plant in (*IMPOSSIBLE, *SYNCHRONISED, *PRODUCTS, *HARMLESS):
            watch.clear()
            refused = ""
            try:
                with watch.loop("inner"):
                    plant(torch)
                inside = watch.syncs, watch.products
                watch.clear()
                plant(torch)
            except (Fault, RuntimeError) as error:
                inside, refused = ({}, {}), str(error).splitlines()[0]
            lines = [[*faults.get("load", {})] for faults in inside]
            found[plant.__name__] = [refused, *lines, bool(watch.syncs or watch.products)]
        watch.clear()
        layer = torch.nn.Linear(4, 4).to(DEVICE)
        for parameter in layer.parameters():
            watch.meant.add(watch.created(parameter))
        with watch.loop("inner"):
            layer(layer(torch.ones(2, 4, device=DEVICE))).relu().square().sum().backward()
        found["meant"] = watch.products
        watch.clear()
        found["peaks"] = peaks(torch, watch)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
