"""Prove the code on a GPU, step by step: python -m tests.gpu [--steps NAME ...] [--out JSON] [--redo]

It needs one 80 GB card and no network. On a CPU the same steps run with the miniature's shapes. A step is a process of
its own with a time limit; its result is written as soon as it ends. A step that has passed on this commit and device is
not repeated, unless --redo is given. Exit code 1: a step failed; 2: the command cannot run here.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu import packages

# Name: module and function. Later steps read what earlier ones wrote.
STEPS = {
    "cpu_cuda": ("training", "cpu_cuda"),
    "model": ("models", "model"),
    "stitch": ("commands", "stitch"),
    "train": ("training", "train"),
    "resume": ("training", "resume"),
    "compile": ("training", "compiled"),
    "options": ("training", "options"),
    "steer": ("commands", "steer"),
    "export": ("commands", "export"),
    "benchmark": ("commands", "benchmark"),
}
LIMIT = 540.0  # seconds of a step
ROOT = Path(__file__).resolve().parents[2]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    names = list(STEPS)
    parser.add_argument("--steps", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu/result.json", help="JSON file; default: runs/gpu")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/gpu", help="folder of the models and runs")
    parser.add_argument("--redo", action="store_true", help="repeat steps that have passed")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a step may take")
    parser.add_argument("--inside", metavar="NAME", help=argparse.SUPPRESS)  # a step's own process
    return parser.parse_args(arguments)


def inside(name: str, work: Path) -> int:
    """Run one step in this process and write what it found."""
    import importlib

    import torch

    from stitchvm_reward.files import write_json
    from tests.gpu.setting import Setting

    module, function = STEPS[name]
    setting = Setting(work, torch.cuda.is_available())
    found = getattr(importlib.import_module(f"tests.gpu.{module}"), function)(setting)
    peak = torch.cuda.max_memory_allocated() / 2**30 if setting.cuda else None
    write_json(
        work / f"{name}.json",
        {
            "passed": bool(found.checks) and all(found.checks.values()),
            "peak_gib": peak,
            "checks": found.checks,
            "figures": found.figures,
            "skipped": found.skipped,
        },
    )
    return 0


def run_step(name: str, work: Path, limit: float) -> dict[str, Any]:
    """Run a step in a process of its own and return its result, failed where it raised or took too long."""
    result = work / f"{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu", "--inside", name, "--work", str(work)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    begin, log = time.monotonic(), work / f"{name}.log"
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    seconds = time.monotonic() - begin
    if code == 0 and result.is_file():
        return json.loads(result.read_text()) | {"seconds": seconds}
    reason = f"took longer than {limit:g} s" if code == -1 else f"ended with exit code {code}"
    return {"passed": False, "seconds": seconds, "reason": reason, "log": log.read_text()[-3000:]}


def same_code(known: dict[str, Any], described: dict[str, Any]) -> bool:
    """Return whether earlier results are of this device and of this code, which must be committed to be compared."""
    committed = bool(described["commit"]) and not described["commit"].endswith("dirty")
    return committed and all(known.get(key) == described[key] for key in ("device", "commit", "torch"))


def main() -> int:
    arguments = parse()
    if absent := packages.missing(packages.NEEDED):
        print(packages.message(absent), file=sys.stderr)
        return 2
    os.chdir(ROOT)
    work = arguments.work.resolve()
    if arguments.inside:
        return inside(arguments.inside, work)
    import torch

    from stitchvm_reward.files import write_json
    from stitchvm_reward.measure import machine

    described = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    work.mkdir(parents=True, exist_ok=True)
    known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    kept = known.get("steps", {}) if same_code(known, described) else {}
    steps: dict[str, Any] = dict(kept)
    for name in arguments.steps:
        if kept.get(name, {}).get("passed") and not arguments.redo:
            print(f"{name:10} passed before")
            continue
        steps[name] = step = run_step(name, work, arguments.limit)
        write_json(arguments.out, described | {"passed": False, "steps": steps})
        failed = [check for check, holds in step.get("checks", {}).items() if not holds]
        told = step.get("reason", "; ".join(failed)) if not step["passed"] else ""
        skips = f"  skipped: {', '.join(step['skipped'])}" if step.get("skipped") else ""
        verdict = "passed" if step["passed"] else "FAILED"
        print(f"{name:10} {verdict}  {step['seconds']:.0f} s  {told}{skips}", flush=True)
    passed = all(steps.get(name, {}).get("passed") for name in arguments.steps)
    write_json(arguments.out, described | {"passed": passed, "steps": steps})
    print(f"{'passed' if passed else 'FAILED'}: {arguments.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
