"""One process of a test of what a process holds while a model is loaded: holding.py PLAN, {"overrides", "out"}.

Each process writes OUT-N.json: the bytes of the whole transformer, of its largest block and of the rest of the
generator, and the largest number of bytes that live tensors had at any time from loading to the prepared network.
"""

import json
import sys
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nft.backend import Backend, zero_stage
from nft.config import load_recipe
from nft.models import load_generator, make_policy
from nft.sharded import load_sharded
from stitchvm_reward.families import family_of
from stitchvm_reward.runs.launcher import make_accelerator, shutdown
from tests.tiny import RECIPE


class Live(TorchDispatchMode):
    """The bytes of all storages that operations have made and that are still alive, and their largest sum."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                weakref.finalize(storage, self._gone, key)
                self.sizes[key] = 0
            self.now += storage.nbytes() - self.sizes[key]
            self.sizes[key] = storage.nbytes()
            self.most = max(self.most, self.now)
        return found


def size(module) -> int:
    return sum(p.numel() * p.element_size() for p in [*module.parameters(), *module.buffers()])


def main(plan: Path) -> None:
    run = json.loads(plan.read_text())
    recipe, accelerator = load_recipe(RECIPE, run["overrides"]), make_accelerator()
    family = family_of(recipe.model.path)
    whole = family.transformer.from_pretrained(recipe.model.path, subfolder="transformer")
    found = {"whole": size(whole), "block": max(size(block) for block in family.blocks(whole))}
    del whole
    with Live() as live:
        sharded = load_sharded(recipe.model, accelerator) if zero_stage(accelerator) == 3 else None
        generator = load_generator(recipe, accelerator.device, sharded)
        backend = Backend(accelerator, make_policy(recipe, generator), recipe.train)
    found["adapters"] = sum(getattr(p, "ds_numel", p.numel()) * 4 for p in backend.parameters)
    found |= {"vae": size(generator.vae), "held": live.now, "most": live.most}
    Path(f"{run['out']}-{accelerator.process_index}.json").write_text(json.dumps(found))
    shutdown(accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
