"""How a recipe scales: python -m nft.cost.scaling RECIPE [key=value ...] [--processes 1 2] [--epochs 4] [--out FILE]

Trains on each number of processes of this machine, always on the same samples, and prints images per second and the
share of the time spent on communication. --estimate runs nothing: from the recipe alone it prints the bytes that the
processes exchange, and how long an epoch should take on many GPUs.
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

from stitchvm_reward.command import add_trust_option, available_device, hide_loading_bars, run_command
from stitchvm_reward.errors import InputError
from stitchvm_reward.files import check_writable, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

    from nft.config import Recipe

GPUS = (8, 64, 1024)  # of the estimate; a growing epoch has the size of the recipe on the first of them
REPEATS = 7


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nft.cost.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a recipe file, such as recipes/shapes/aesthetic.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to set")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to measure")
    parser.add_argument("--epochs", type=int, default=4, help="measured epochs, after one for warm-up")
    parser.add_argument("--estimate", action="store_true", help="print bytes and estimates for many GPUs; run nothing")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    add_trust_option(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def alone(call: Callable[[], Any], accelerator: "Accelerator") -> float:
    """Return the median seconds of a collective that all processes enter at the same time."""
    import torch

    seconds = []
    for _ in range(REPEATS + 1):
        accelerator.wait_for_everyone()
        start = time.perf_counter()
        call()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def measure_here(recipe: "Recipe", accelerator: "Accelerator", epochs: int) -> dict[str, Any]:
    """Measure this process: for each epoch its seconds, those spent in syncs and those of CPU time.

    `gradient` is an all-reduce of as many bytes as the gradient has and `meeting` one sync, both timed alone.
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
    single = accelerator.num_processes == 1
    gradient, counts = torch.zeros(count, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    return {
        "seconds": [row[0] for row in rows[1:]],
        "meet": [row[1] for row in rows[1:]],
        "cpu": [row[2] for row in rows[1:]],
        "adapter_parameters": count,
        "gradient": 0.0 if single else alone(lambda: torch.distributed.all_reduce(gradient), accelerator),
        "meeting": 0.0 if single else alone(lambda: torch.distributed.all_reduce(counts), accelerator),
    }


def work(plan: Path) -> None:
    """Run one process of a measurement and write its result to rank-N.json beside the plan."""
    hide_loading_bars()
    from nft.config import load_recipe
    from stitchvm_reward.measure import machine
    from stitchvm_reward.runs.launcher import make_accelerator, shutdown
    from stitchvm_reward.runs.numerics import set_numerics

    settings = json.loads(plan.read_text())
    recipe = load_recipe(settings["recipe"], settings["overrides"])
    set_numerics(bool(recipe.model.deterministic), recipe.model.tf32)
    accelerator = make_accelerator(recipe.timeout)
    result = measure_here(recipe, accelerator, settings["epochs"]) | {"machine": machine(accelerator.device)}
    write_json(plan.parent / f"rank-{accelerator.process_index}.json", result)
    shutdown(accelerator)


def start(processes: int, plan: Path) -> None:
    """Run `work` on so many processes.

    On a CPU each has one thread, so that more processes use more cores. Raises InputError where one fails; it has
    printed its own error.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if available_device().type == "cpu" else {})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "nft.cost.scaling", str(plan), "--worker"]
    if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
        raise InputError(f"measuring on {processes} processes failed: see the error above")


def row_of(results: list[dict[str, Any]], recipe: "Recipe") -> dict[str, Any]:
    """Return one row for the results of all processes: medians over epochs.

    An epoch is as long as its slowest process. `meet_share` is the mean over processes of the time spent in syncs,
    waiting included; `gradient_share` and `meetings_share` are the collectives alone. `cpu_share` is the share of a
    core that a process had: on a CPU it is below 1 - `meet_share` where the machine had other work too.
    """
    from nft.cost.communication import bytes_per_epoch

    processes, samples = len(results), recipe.rollout.groups * recipe.rollout.group_size
    epochs = list(zip(*(one["seconds"] for one in results), strict=True))
    meets = list(zip(*(one["meet"] for one in results), strict=True))
    seconds = median(max(epoch) for epoch in epochs)
    shares = [cpu / one_epoch for one in results for cpu, one_epoch in zip(one["cpu"], one["seconds"])]
    messages = bytes_per_epoch(recipe, results[0]["adapter_parameters"], processes)
    meetings = sum(message.times for message in messages if "meeting" in message.what)
    gradient, meeting = (mean(one[name] for one in results) for name in ("gradient", "meeting"))
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
    """Return a row for each number of processes, and the machine. Raises InputError where there are too few devices."""
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
            results = [json.loads((plan.parent / f"rank-{rank}.json").read_text()) for rank in range(processes)]
        about = results[0]["machine"]
        rows.append(row_of(results, recipe))
    return about | {"rows": rows}


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of the measured rows."""
    first = rows[0]["images_per_second_per_process"]
    table = [
        f"{'processes':>9}{'s/epoch':>12}{'images/s':>10}{'/process':>11}{'efficiency':>14}{'CPU':>11}{'sync':>9}"
        f"{'all-reduce':>12}{'messages':>10}"
    ]
    for row in rows:
        each = row["images_per_second_per_process"]
        table.append(
            f"{row['processes']:9}{row['epoch_seconds']:12.3f}{row['images_per_second']:10.2f}{each:11.2f}"
            f"{each / first:14.1%}{row['cpu_share']:11.1%}{row['meet_share']:9.1%}{row['gradient_share']:12.2%}"
            f"{row['meetings_share']:10.2%}"
        )
    return [
        *table,
        "efficiency: images/s per process, relative to the first row. Shares of an epoch's time: CPU, a process had a",
        "core (less where other work runs beside it); sync, syncs with the others, waiting included; all-reduce, the",
        "gradient's bytes alone, of which training hides a part behind its backward pass; messages, the syncs' alone",
    ]


def estimated(recipe: "Recipe") -> tuple[dict[str, Any], list[str]]:
    """Return the bytes and estimates of a recipe, and the printed lines. Raises InputError for unknown shapes."""
    from nft.cost.communication import (
        Cluster,
        bytes_per_epoch,
        bytes_per_evaluation,
        estimate,
        estimate_lines,
        grown,
        message_lines,
    )
    from nft.cost.micro_batch import device_memory, fit
    from nft.cost.shapes import costs

    recipe = fit(recipe, GPUS[0], device_memory())
    cost, cluster, base = costs(recipe), Cluster(), GPUS[0]
    messages = bytes_per_epoch(recipe, cost.adapter_parameters, base)
    evaluation = bytes_per_evaluation(recipe, base)
    rows = [{"epoch": "fixed"} | estimate(recipe, cost, n, cluster) for n in GPUS]
    rows += [{"epoch": "grown"} | estimate(grown(recipe, n, base), cost, n, cluster) for n in GPUS[1:]]
    missing = f"; not counted: {', '.join(cost.score_unknown)}" if cost.score_unknown else ""
    text = [
        f"an epoch on {base} GPUs, {cost.adapter_parameters:,} adapter parameters",
        *message_lines([*messages, *evaluation], base),
        "",
        f"assumed, not measured: {cluster.peak / 1e12:g} TFLOP/s per GPU, of which {cluster.reached:.0%} is reached; "
        f"{cluster.inside / 1e9:g} GB/s within {cluster.node} GPUs, {cluster.between / 1e9:g} GB/s beyond; "
        f"{cluster.latency * 1e6:g} us per step of a collective{missing}",
        *estimate_lines(rows),
        "seconds of an epoch: even, an even share of the work; undivided, waiting where micro batches do not divide by",
        "processes; stops, waiting for rollouts that stop later; gradients, their all-reduce without overlap; others,",
        "all other messages. most: micro batches of the busiest process; images/s and efficiency: of the whole",
    ]
    content = {"messages": [asdict(m) for m in messages], "evaluation": [asdict(m) for m in evaluation]}
    return content | {"assumed": asdict(cluster), "not_counted": cost.score_unknown, "estimates": rows}, text


def run(arguments: argparse.Namespace) -> None:
    if arguments.worker:
        return work(Path(arguments.recipe))
    if arguments.epochs < 1:
        raise InputError(f"--epochs must be at least 1, got {arguments.epochs}")
    if arguments.out is not None:
        check_writable(arguments.out)
    from nft.config import load_recipe
    from stitchvm_reward.runs.recipe import require_trust

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    require_trust(recipe.code, arguments.trust_code, arguments.recipe)
    about = {"recipe": arguments.recipe, "overrides": arguments.overrides}
    if arguments.estimate:
        result, text = estimated(recipe)
    else:
        result = measure(arguments, recipe)
        text = lines(result["rows"])
        print("  ".join(f"{name} {value}" for name, value in result.items() if name != "rows"))
    print("\n".join(text))
    if arguments.out is not None:
        write_json(arguments.out, about | result)
    return None


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(parse())))
