"""What `auto` means for a recipe's micro batches: the largest that fit the device and share the work evenly."""

from collections.abc import Callable
from dataclasses import replace

import torch
from tqdm import tqdm

from nft.compilation import compilation_here
from nft.config import Recipe
from nft.cost.memory import GIB, memory, with_overhead
from nft.cost.plan import cost_lines, work_lines
from nft.geometry import Geometry
from nft.rollout import AUTO
from stitchvm_reward.errors import InputError
from stitchvm_reward.runs.geometry import share
from stitchvm_reward.runs.rank_sync import RankSync

SIZES = [2**power for power in range(8, -1, -1)]
ON_CPU = 8  # larger ones are no faster there
UNEVEN = 1 / 16  # a process may work this much longer than an even share, for the sake of a larger micro batch


def device_memory() -> int | None:
    """Return the bytes of this process's GPU; None on a CPU."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def automatic(recipe: Recipe) -> list[str]:
    """Return the names of the settings that are auto."""
    sizes = {
        "rollout.micro_batch": recipe.rollout.micro_batch,
        "train.micro_batch": recipe.train.micro_batch,
        "evaluation.micro_batch": recipe.evaluation.micro_batch,
    }
    inherit = [] if sizes["rollout.micro_batch"] != AUTO else [name for name, size in sizes.items() if size is None]
    return [*(name for name, size in sizes.items() if size == AUTO), *inherit]


def _sized(recipe: Recipe, rollout: int, train: int, evaluation: int) -> Recipe:
    return replace(
        recipe,
        rollout=replace(recipe.rollout, micro_batch=rollout),
        train=replace(recipe.train, micro_batch=train),
        evaluation=replace(recipe.evaluation, micro_batch=evaluation),
    )


def _fitting(recipe: Recipe, available: int | None) -> Callable[[int, str], bool]:
    """Return what tells whether a micro batch fits in `rollout`, `train` or `evaluation`.

    Raises InputError for a model whose shapes are not known.
    """
    if available is None:
        return lambda size, phase: size <= ON_CPU
    try:
        memory(_sized(recipe, 1, 1, 1))
    except InputError as error:
        raise InputError(f"{', '.join(automatic(recipe))} cannot be {AUTO}: {error}; give a number") from None

    def fits(size: int, phase: str) -> bool:
        expected = memory(_sized(recipe, size, size, size))
        apart = {"train": ("train",), "evaluation": ("evaluate",)}
        names = apart.get(phase) or ("rollout", "decode", "score", "audit")
        return max(with_overhead(expected[name]) for name in names if name in expected) * GIB <= available

    return fits


def fit(recipe: Recipe, processes: int, available: int | None) -> Recipe:
    """Return the recipe with numbers for all three micro batches, on devices of so many bytes (None: CPUs).

    `auto` becomes the largest power of two that the memory plan says fits and with which no process works much longer
    than an even share; 1 where none fits. On a CPU it is at most 8. Raises InputError for a model whose shapes are not
    known.
    """
    wanted = automatic(recipe)
    fits = _fitting(recipe, available) if wanted else None
    rollout, train, evaluation = recipe.rollout, recipe.train, recipe.evaluation

    def largest(phase: str, busiest: Callable[[int], int], count: int) -> int:
        assert fits is not None
        most = -(-count // processes) * (1 + UNEVEN)
        return next((size for size in SIZES if fits(size, phase) and busiest(size) <= most), 1)

    def trained(size: int, other: int = 1) -> int:
        """Return the samples of the busiest process."""
        dealt = Geometry(rollout.groups, rollout.group_size, size, processes, train.updates_per_epoch, max(size, other))
        return max(sum(len(dealt.members(part)) for part in parts) for parts in dealt.deal())

    def evaluated(size: int) -> int:
        """Return the images of the busiest process, its last micro batch counted as a whole one."""
        return max(-(-len(share(evaluation.samples, rank, processes)) // size) * size for rank in range(processes))

    samples = rollout.groups * rollout.group_size
    sizes = [rollout.micro_batch, train.micro_batch, evaluation.micro_batch]
    if sizes[0] == AUTO:
        sizes[0] = largest("rollout", trained, samples)
        sizes[1:] = [AUTO if size is None else size for size in sizes[1:]]
    if sizes[1] == AUTO:
        sizes[1] = largest("train", lambda size: trained(size, sizes[0]), samples)
    if sizes[2] == AUTO:
        sizes[2] = largest("evaluation", evaluated, evaluation.samples)
    return _sized(recipe, sizes[0], sizes[1] or sizes[0], sizes[2] or sizes[0])


def fit_devices(recipe: Recipe, ranks: RankSync) -> Recipe:
    """Return the recipe fitted to the smallest device of all processes, on all processes alike."""
    mine = device_memory()
    smallest = -ranks.sync(count=-mine) if mine else None
    accelerator = ranks.accelerator
    if accelerator.is_main_process:
        for line in auto_lines(recipe, smallest):
            tqdm.write(line)
    return fit(recipe, accelerator.num_processes, smallest)


def auto_lines(recipe: Recipe, available: int | None) -> list[str]:
    """Return the plan's line on what is auto in a recipe, if anything is."""
    if not (names := automatic(recipe)):
        return []
    room = f"at most {ON_CPU} on a CPU" if available is None else f"the largest that fits {available / GIB:.1f} GiB"
    return [f"auto         {', '.join(names)}: {room}, with the work shared evenly"]


def print_plan(recipe: Recipe, processes: int) -> None:
    """Print the whole plan of a recipe on so many processes, each with a device like this one's."""
    available = device_memory()
    fitted = fit(recipe, processes, available)
    lines = [*work_lines(fitted, processes), *auto_lines(recipe, available), compilation_here(recipe.model).line()]
    print("\n".join([*lines, *cost_lines(fitted, processes)]))
