"""How a recipe scales: python -m nft.cost.scaling RECIPE [key=value ...] [--processes 1 2] [--epochs 4] [--out FILE]

Trains on each number of processes of this machine, the same samples every time, and tells images per second and the
share of the time that is communication. --estimate tells instead, from the recipe alone, what the processes say to
each other in bytes and what an epoch should take on many GPUs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from stitchvm_reward.command import available_device, hide_loading_bars, run_command
from stitchvm_reward.errors import InputError
from stitchvm_reward.files import check_writable, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

    from nft.config import Recipe

GPUS = (8, 64, 1024)  # of the estimate; an epoch that grows has the recipe's size on the first
REPEATS = 7


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nft.cost.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a recipe file, such as recipes/shapes/aesthetic.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to set")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes, one each")
    parser.add_argument("--epochs", type=int, default=4, help="epochs that count, after one that does not")
    parser.add_argument("--estimate", action="store_true", help="bytes and an estimate for many GPUs; runs nothing")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def alone(call: Callable[[], Any], accelerator: "Accelerator") -> float:
    """Seconds that a collective takes by itself when all processes come to it at once: the median of some."""
    import torch

    found = []
    for _ in range(REPEATS + 1):
        accelerator.wait_for_everyone()
        start = time.perf_counter()
        call()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return median(found[1:])


def measure_here(recipe: "Recipe", accelerator: "Accelerator", epochs: int) -> dict[str, Any]:
    """This process's seconds of each epoch that counts, those it met others in, those of a CPU, and its collectives'.

    `gradient` is an all-reduce of as many bytes as the gradient has, `meeting` one meeting, both by themselves.
    """
    import torch

    from nft.trainer import Trainer

    trainer = Trainer(recipe, accelerator)
    device, rows = accelerator.device, []
    for _ in range(epochs + 1):
        trainer.timings.take()
        start, worked = time.perf_counter(), time.process_time()
        trainer.run_epoch()
        if device.type == "cuda":
            torch.cuda.synchronize()
        met = trainer.timings.take().get("seconds/meet", 0.0)
        rows.append((time.perf_counter() - start, met, time.process_time() - worked))
    if trainer.tracker is not None:
        trainer.tracker.close()
    count = sum(parameter.numel() for parameter in trainer.learner.backend.parameters)
    lone = accelerator.num_processes == 1
    gradient, said = torch.zeros(count, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    return {
        "seconds": [row[0] for row in rows[1:]],
        "meet": [row[1] for row in rows[1:]],
        "cpu": [row[2] for row in rows[1:]],
        "adapter_parameters": count,
        "gradient": 0.0 if lone else alone(lambda: torch.distributed.all_reduce(gradient), accelerator),
        "meeting": 0.0 if lone else alone(lambda: torch.distributed.all_reduce(said), accelerator),
    }


def work(plan: Path) -> None:
    """One process of a measurement: leaves what it found in rank-N.json beside the plan."""
    hide_loading_bars()
    from nft.config import load_recipe
    from stitchvm_reward.measure import machine
    from stitchvm_reward.runs.launcher import make_accelerator, shutdown

    given = json.loads(plan.read_text())
    recipe = load_recipe(given["recipe"], given["overrides"])
    accelerator = make_accelerator(recipe.timeout)
    found = measure_here(recipe, accelerator, given["epochs"]) | {"machine": machine(accelerator.device)}
    write_json(plan.parent / f"rank-{accelerator.process_index}.json", found)
    shutdown(accelerator)


def start(processes: int, plan: Path) -> None:
    """Run `work` on so many processes, on a CPU with one thread each: more processes are to have more cores, not
    the same cores otherwise. Raises InputError where one failed, which says itself why."""
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if available_device().type == "cpu" else {})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "nft.cost.scaling", str(plan), "--worker"]
    if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
        raise InputError(f"measuring on {processes} processes failed: see its own error above")


def row_of(found: list[dict[str, Any]], recipe: "Recipe") -> dict[str, Any]:
    """What all processes of one measurement found, in one row: medians over its epochs.

    An epoch is as long as its slowest process. `meet_share` is the mean over processes of the time in which one meets
    the others, waiting included; `gradient_share` and `meetings_share` are the collectives by themselves. `cpu_share`
    is how much of a core one had: on a CPU below 1 less `meet_share` where the machine had other work too.
    """
    from nft.cost.communication import bytes_per_epoch

    processes, samples = len(found), recipe.rollout.groups * recipe.rollout.group_size
    epochs = list(zip(*(one["seconds"] for one in found), strict=True))
    meets = list(zip(*(one["meet"] for one in found), strict=True))
    seconds = median(max(epoch) for epoch in epochs)
    shares = [cpu / one_epoch for one in found for cpu, one_epoch in zip(one["cpu"], one["seconds"])]
    messages = bytes_per_epoch(recipe, found[0]["adapter_parameters"], processes)
    meetings = sum(message.times for message in messages if "meeting" in message.what)
    gradient, meeting = (mean(one[name] for one in found) for name in ("gradient", "meeting"))
    return {
        "processes": processes,
        "epoch_seconds": seconds,
        "images_per_second": samples / seconds,
        "images_per_second_per_process": samples / seconds / processes,
        "meet_share": median(mean(meet) / max(epoch) for meet, epoch in zip(meets, epochs)),
        "cpu_share": median(shares),
        "gradient_seconds": gradient,
        "gradient_share": gradient * recipe.train.updates_per_epoch / seconds,
        "meeting_seconds": meeting,
        "meetings_share": meeting * meetings / seconds,
        "bytes_per_epoch": sum(message.bytes for message in messages),
        "epochs": epochs,
    }


def measure(arguments: argparse.Namespace, recipe: "Recipe") -> dict[str, Any]:
    """A row for each number of processes, and the machine. Raises InputError where there are too few devices."""
    import torch

    from nft.preflight import check_inputs
    from nft.prompts import check_prompts

    cuda = available_device().type == "cuda"
    available = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0))
    for processes in arguments.processes:
        if not 1 <= processes <= available:
            raise InputError(
                f"--processes must be from 1 to the {available} {'GPUs' if cuda else 'cores'} here, got {processes}"
            )
    check_inputs(recipe)
    check_prompts(recipe)
    rows, about = [], {}
    for processes in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            plan = Path(folder) / "plan.json"
            overrides = [*arguments.overrides, f"out={folder}/run"]
            write_json(plan, {"recipe": arguments.recipe, "overrides": overrides, "epochs": arguments.epochs})
            start(processes, plan)
            found = [json.loads((plan.parent / f"rank-{rank}.json").read_text()) for rank in range(processes)]
        about = found[0]["machine"]
        rows.append(row_of(found, recipe))
    return about | {"rows": rows}


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of what was measured."""
    first = rows[0]["images_per_second_per_process"]
    told = [
        f"{'processes':>9}{'s an epoch':>12}{'images/s':>10}{'a process':>11}{'of the first':>14}{'of a core':>11}"
        f"{'meeting':>9}{'all-reduce':>12}{'messages':>10}"
    ]
    for row in rows:
        each = row["images_per_second_per_process"]
        told.append(
            f"{row['processes']:9}{row['epoch_seconds']:12.3f}{row['images_per_second']:10.2f}{each:11.2f}"
            f"{each / first:14.1%}{row['cpu_share']:11.1%}{row['meet_share']:9.1%}{row['gradient_share']:12.2%}"
            f"{row['meetings_share']:10.2%}"
        )
    return [
        *told,
        "shares of an epoch's time: in which a process had a core, less where other work runs beside it; meeting the",
        "others, waiting included; an all-reduce of the gradient's bytes by itself, of which training hides a part",
        "behind its backward pass; the meetings' messages by themselves",
    ]


def estimated(recipe: "Recipe") -> tuple[dict[str, Any], list[str]]:
    """Bytes and estimates of a recipe, and how they are told. Raises InputError for a model of unknown shape."""
    from nft.cost.communication import (
        Cluster,
        bytes_per_epoch,
        bytes_per_evaluation,
        estimate,
        estimate_lines,
        grown,
        message_lines,
    )
    from nft.cost.shapes import costs

    found, cluster, base = costs(recipe), Cluster(), GPUS[0]
    messages = bytes_per_epoch(recipe, found.adapter_parameters, base)
    evaluation = bytes_per_evaluation(recipe, base)
    rows = [{"epoch": "fixed"} | estimate(recipe, found, n, cluster) for n in GPUS]
    rows += [{"epoch": "grown"} | estimate(grown(recipe, n, base), found, n, cluster) for n in GPUS[1:]]
    missing = f"; not counted: {', '.join(found.score_unknown)}" if found.score_unknown else ""
    told = [
        f"an epoch on {base} GPUs, {found.adapter_parameters:,} adapter parameters",
        *message_lines([*messages, *evaluation], base),
        "",
        f"assumed, not measured: {cluster.peak / 1e12:g} TFLOP/s a GPU, of which {cluster.reached:.0%} are reached; "
        f"{cluster.inside / 1e9:g} GB/s within {cluster.node} GPUs, {cluster.between / 1e9:g} GB/s beyond; "
        f"{cluster.latency * 1e6:g} us a step of a collective{missing}",
        *estimate_lines(rows),
        "seconds of an epoch: an even share of the work; waiting where micro batches do not divide, and where rollouts",
        "that stop at different steps meet after each; the gradients' all-reduce with nothing of it hidden; all other",
        "messages. most: micro batches of one process; images/s and efficiency are of the whole",
    ]
    content = {"messages": [asdict(m) for m in messages], "evaluation": [asdict(m) for m in evaluation]}
    return content | {"assumed": asdict(cluster), "not_counted": found.score_unknown, "estimates": rows}, told


def run(arguments: argparse.Namespace) -> None:
    if arguments.worker:
        return work(Path(arguments.recipe))
    if arguments.epochs < 1:
        raise InputError(f"--epochs must be at least 1, got {arguments.epochs}")
    if arguments.out is not None:
        check_writable(arguments.out)
    from nft.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    about = {"recipe": arguments.recipe, "overrides": arguments.overrides}
    if arguments.estimate:
        found, told = estimated(recipe)
    else:
        found = measure(arguments, recipe)
        told = lines(found["rows"])
        print("  ".join(f"{name} {value}" for name, value in found.items() if name != "rows"))
    print("\n".join(told))
    if arguments.out is not None:
        write_json(arguments.out, about | found)
    return None


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(parse())))
