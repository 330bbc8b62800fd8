"""One process of a count of what crosses between processes: counting.py PLAN, a JSON list of runs.

Each run is {"recipe": ..., "overrides": [...], "out": FILE}. Process 0 writes FILE: for the start, the first epoch, the
second one, an evaluation and a planted broadcast of the network, every collective as [operation, bytes that the process
hands over, times], and the bytes that its sockets sent, null where the system does not tell.
"""

import json
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nft.config import load_recipe
from nft.trainer import Trainer
from stitchvm_reward.runs.launcher import make_accelerator, shutdown

# Where Linux from 4.19 on keeps the bytes sent in its struct tcp_info.
SENT = 200


class Collectives(TorchDispatchMode):
    """Every collective of this process: all go through torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            name = func.__name__.partition(".")[0]
            handed = tree_leaves(args[1] if "gather" in name else args)
            size = sum(t.numel() * t.element_size() for t in handed if isinstance(t, torch.Tensor))
            self.seen[name, size] += 1
        return func(*args, **(kwargs or {}))


def sent() -> int | None:
    """Bytes that all TCP sockets of this process have sent."""
    total = 0
    try:
        for name in os.listdir("/proc/self/fd"):
            try:
                if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    continue
                copy = socket.socket(fileno=os.dup(int(name)))
            except OSError:  # closed since it was listed
                continue
            with copy:
                if copy.type == socket.SOCK_STREAM and copy.family in (socket.AF_INET, socket.AF_INET6):
                    (found,) = struct.unpack_from("Q", copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), SENT)
                    total += found
    except (OSError, AttributeError, struct.error):
        return None
    return total


def counted(work: Callable) -> dict:
    """What crossed while `work` was done."""
    before = sent()
    with Collectives() as collectives:
        work()
    after = sent()
    through = after - before if after is not None and before is not None else None
    return {"collectives": [[*key, times] for key, times in collectives.seen.items()], "sent": through}


def count(run: dict, accelerator: Accelerator) -> dict:
    recipe, made = load_recipe(run["recipe"], run["overrides"]), []
    found = {"start": counted(lambda: made.append(Trainer(recipe, accelerator)))}
    (trainer,) = made
    found |= {"first": counted(trainer.run_epoch), "second": counted(trainer.run_epoch)}
    found["evaluation"] = counted(lambda: trainer.held_out.evaluate(2))
    found["adapter_parameters"] = sum(parameter.numel() for parameter in trainer.learner.backend.parameters)
    weights = list(trainer.learner.network.parameters())
    found["network_bytes"] = sum(p.numel() * p.element_size() for p in weights)
    found["network_parameters"] = len(weights)
    whole = torch.cat([p.detach().flatten() for p in weights])
    found["planted"] = counted(lambda: torch.distributed.broadcast(whole, 0))
    return found


def main(plan: Path) -> None:
    accelerator = make_accelerator()
    for run in json.loads(plan.read_text()):
        found = count(run, accelerator)
        if accelerator.is_main_process:
            Path(run["out"]).write_text(json.dumps(found))
        accelerator.free_memory()
    shutdown(accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
