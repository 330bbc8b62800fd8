"""What the steps run on: full-size shapes on a GPU, the miniature's on a CPU, with random weights on the local disk."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.tiny import ROOT, STOPPED, TINY

SMALL = (
    "rollout.groups=2",
    "rollout.group_size=8",
    "rollout.micro_batch=8",
    "epochs=2",
    "evaluation.every=0",
    "evaluation.samples=8",
    "evaluation.grid=4",
    "evaluation.steps=4",
    "checkpoint.every=1",
    "tracking=[jsonl]",
)
RUNS = {  # name of a run: recipe at full size, recipe of the miniature
    "full": ("recipes/aesthetic_pixel.yaml", "recipes/shapes/aesthetic.yaml"),
    "stopped": ("recipes/aesthetic.yaml", "recipes/shapes/stopped.yaml"),
    "draft": ("recipes/draft_pixel.yaml", "recipes/shapes/draft.yaml"),
    "draft_stopped": ("recipes/draft.yaml", "recipes/shapes/draft_stopped.yaml"),
}


@dataclass
class Findings:
    """What a step found: named checks that hold or not, figures, and what this machine could not check, and why."""

    checks: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def check(self, name: str, holds: bool, found: Any = None) -> None:
        """Record a check, and beside it what was found."""
        self.checks[name] = bool(holds)
        if found is not None:
            self.figures[name] = found


@dataclass(frozen=True)
class Setting:
    """A folder to work in, and whether there is a GPU."""

    work: Path
    cuda: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.cuda else "cpu")

    @property
    def shapes(self) -> str:
        """The model whose shapes the random one has."""
        return "stabilityai/stable-diffusion-3.5-medium" if self.cuda else "miniature/weights/sd3"

    @property
    def model(self) -> Path:
        return self.work / "model"

    @property
    def clip(self) -> Path:
        return self.work / "clip" if self.cuda else ROOT / "miniature/weights/clip"

    @property
    def head(self) -> Path:
        return self.work / "head" if self.cuda else ROOT / "miniature/weights/aesthetic"

    @property
    def value_model(self) -> Path:
        return self.work / "stitch/value_model"

    @property
    def images(self) -> Path:
        return self.work / "images"

    def recipe(self, run: str) -> str:
        return RUNS[run][0 if self.cuda else 1]

    def overrides(self, run: str, out: str, *more: str) -> list[str]:
        """Return what makes a recipe run on the random model for a short time."""
        given = [f"model.path={self.model}", f"out={self.work / out}", f"prompts.cache={self.work / 'prompts'}"]
        given += [f"prompts.train={self.work / 'train.txt'}", f"prompts.held_out={self.work / 'held_out.txt'}"]
        given += list(SMALL) if self.cuda else [*TINY, "epochs=2", "tracking=[jsonl]", "evaluation.metrics=[]"]
        pixel = f"{{kind: aesthetic, model: {self.clip}, head: {self.head}}}"
        value = f"{{kind: value, value_model: {self.value_model}}}"
        given.append("model.compile=false")  # compiled code has steps of its own
        stopped = "stopped" in run
        given.append(f"rewards=[{value if stopped else pixel}]")
        if stopped:
            # Random weights say nothing of the reward: an audit runs, and stops nothing.
            given += [*STOPPED[2:], "audit.on_drift=warn"]
            given += [] if self.cuda else [STOPPED[1]]
        if run.startswith("draft") and not self.cuda:
            given += ["train.old_schedule=0", "train.beta_kl=0.01"]
        return [*given, *more]


def command(name: str, *arguments: object) -> int:
    """Run launch/NAME.py in this process, so that its memory is measured, and return its exit code."""
    sys.argv = [f"launch/{name}.py", *map(str, arguments)]
    specification = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    path = list(sys.path)
    specification.loader.exec_module(module)
    sys.path[:] = path
    return module.main()


def launched(start: list[str], script: str, *arguments: object, timeout: float = 500) -> tuple[int, str]:
    """Run a command in processes of its own and return its exit code and the end of what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *start, script, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return done.returncode, (done.stdout + done.stderr)[-2000:]
