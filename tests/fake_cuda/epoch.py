"""One epoch of a recipe on the stand-in device, from loading to the last evaluation, by the Trainer itself."""

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import nft.rollout
from nft.backend import Backend
from nft.config import Recipe, load_recipe
from nft.cost.memory import memory
from nft.cost.micro_batch import device_memory, fit
from nft.objectives import OBJECTIVES, objective_class
from nft.scoring import Scorer
from nft.trainer import Trainer
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.rewards.clip import ImageTower
from stitchvm_reward.runs.launcher import make_accelerator
from stitchvm_reward.runs.tracking import Timings
from stitchvm_reward.stitching.value_model import StitchedValueModel
from tests.fake_cuda.device import GIB
from tests.fake_cuda.mode import FakeCuda
from tests.fake_cuda.stand_ins import Hub, provide
from tests.fake_cuda.watch import Fault, Watch

TOLERANCE = 0.1  # of the plan against the tracked peak
HEAD = f"{'recipe':36} {'phase':10} {'peak GiB':>8} {'plan':>8} {'ratio':>6} {'waits':>6} {'float32':>8}"


@dataclass
class Result:
    """What an epoch came to: peak bytes by phase, the plan's, and the faults found with how often they occurred."""

    recipe: str
    cut: list[str]
    peaks: dict[str, float] = field(default_factory=dict)
    plan: dict[str, float] = field(default_factory=dict)
    synchronisations: dict[str, dict[str, int]] = field(default_factory=dict)
    float32_products: dict[str, dict[str, int]] = field(default_factory=dict)
    fault: str | None = None

    def ratios(self) -> dict[str, float]:
        """Return plan over tracked peak of every phase that both know."""
        return {name: size / self.peaks[name] for name, size in self.plan.items() if self.peaks.get(name)}

    def problems(self) -> list[str]:
        """Return what keeps this run from passing."""
        found = [self.fault] if self.fault else []
        for name, ratio in self.ratios().items():
            if abs(ratio - 1) > TOLERANCE:
                found.append(f"{name}: the plan is {ratio:.2f} times the tracked peak")
        for what, faults in (("waits", self.synchronisations), ("float32 product", self.float32_products)):
            for phase, lines in faults.items():
                found += [f"{phase}: {what} x {count}, {line}" for line, count in lines.items()]
        return found

    def table(self) -> list[str]:
        """Return a row of the table for each phase."""
        rows = []
        for name, peak in self.peaks.items():
            plan = f"{self.plan[name]:8.2f} {self.ratios()[name]:6.2f}" if name in self.plan else f"{'-':>8} {'-':>6}"
            waits, products = (
                sum(faults.get(name, {}).values()) for faults in (self.synchronisations, self.float32_products)
            )
            rows.append(f"{self.recipe:36} {name:10} {peak:8.2f} {plan} {waits:6} {products:8}")
        return rows


def cut(path: str, folder: Path) -> tuple[Recipe, list[str]]:
    """Return a recipe with fewer repetitions of the same work, and the settings that say so.

    Two full micro batches of training, one of evaluation, and few steps and levels remain: peaks of memory do not grow
    with these numbers, except for what is kept of every sample, which the plan counts too. Nothing is compiled: the
    stand-in device has no compiler.
    """
    whole = fit(load_recipe(path), 1, device_memory())
    batch, trained, evaluated = (part.micro_batch for part in (whole.rollout, whole.train, whole.evaluation))
    less = [
        "epochs=1",
        "rollout.groups=2",
        f"rollout.group_size={max(4, batch // 2, trained)}",
        f"rollout.micro_batch={batch}",
        f"train.micro_batch={trained}",
        f"evaluation.micro_batch={evaluated}",
        f"evaluation.samples={max(2, min(evaluated, whole.evaluation.samples))}",
        "evaluation.steps=2",
        "evaluation.grid=1",
        "audit.samples=8",
        "audit.on_drift=warn",
        "model.compile=false",
    ]
    less.append("rollout.steps=3")
    most = 1 if whole.rollout.stop_window else 2  # levels
    if whole.rollout.stop_window:
        less.append("rollout.stop_window=[1,2]")
    if whole.train.objective in ("nft", "awm"):
        less.append(f"train.levels_per_sample={min(most, whole.train.levels_per_sample)}")
    if whole.train.objective == "flow_grpo":
        less += ["train.sde_within=2", f"train.sde_steps={min(2, whole.train.sde_steps)}"]
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a picture number {n}\n" for n in range(max(8, evaluated))))
    files = [f"prompts.train={prompts}", f"prompts.held_out={prompts}", f"prompts.cache={folder / 'prompts'}"]
    return load_recipe(path, [*less, *files, f"out={folder / 'run'}", "tracking=[jsonl]"]), less


def _around(owner: Any, name: str, enter: Callable[[], Any]) -> None:
    """Run a function or method of `owner` inside the context that `enter` returns."""
    original = getattr(owner, name)

    @wraps(original)
    def inside(*arguments: Any, **named: Any) -> Any:
        with enter():
            return original(*arguments, **named)

    setattr(owner, name, inside)


def observe(watch: Watch) -> None:
    """Tell `watch` which phase and which inner loop the code is in."""
    original = Timings.phase

    @contextmanager
    def phase(self: Timings, name: str) -> Iterator[None]:
        with watch.phase(name), original(self, name):
            yield

    Timings.phase = phase  # type: ignore[method-assign]
    _around(nft.rollout, "solve_each", lambda: watch.loop("solver"))
    _around(Generator, "decode", lambda: watch.loop("decode"))
    _around(Scorer, "score", lambda: watch.loop("score"))
    _around(Scorer, "value", lambda: watch.loop("value"))
    _around(Backend, "backward", lambda: watch.loop("backward"))
    _around(Backend, "step", lambda: watch.phase("optimizer"))
    for name in OBJECTIVES:
        _observe_losses(objective_class(name), watch)


def _observe_losses(objective: Any, watch: Watch) -> None:
    losses = objective.losses

    def observed(self: Any, *arguments: Any, **named: Any) -> list[Callable]:
        def inside(compute: Callable) -> Callable:
            def call() -> Any:
                with watch.loop("loss"):
                    return compute()

            return call

        return [inside(compute) for compute in losses(self, *arguments, **named)]

    objective.losses = observed


def mean_float32(watch: Watch) -> None:
    """Note networks that are float32, of which a GPU rounds the products' inputs to TF32 (`model.tf32`): an autoencoder
    that the recipe keeps in it, the rewards' towers and the value models' own networks."""

    def note(module: Any) -> None:
        for tensor in [*module.parameters(), *module.buffers()]:
            watch.meant.add(watch.created(tensor))

    value_model = StitchedValueModel.from_pretrained.__func__  # type: ignore[attr-defined]
    load, tower = Generator.load.__func__, ImageTower.__init__  # type: ignore[attr-defined]

    def loaded(cls: Any, *arguments: Any, **named: Any) -> Generator:
        generator = load(cls, *arguments, **named)
        note(generator.vae)
        return generator

    def towered(self: ImageTower, *arguments: Any, **named: Any) -> None:
        tower(self, *arguments, **named)
        note(self.clip)

    def valued(cls: Any, *arguments: Any, **named: Any) -> StitchedValueModel:
        model = value_model(cls, *arguments, **named)
        note(model.network)
        return model

    StitchedValueModel.from_pretrained = classmethod(valued)  # type: ignore[assignment,method-assign]
    Generator.load = classmethod(loaded)  # type: ignore[assignment,method-assign]
    ImageTower.__init__ = towered  # type: ignore[method-assign]


class Machine:
    """The stand-in device with a hub beside it; `run` runs an epoch of a recipe on it."""

    def __init__(self, hub: Hub, watch: Watch):
        self.hub, self.watch = hub, watch
        observe(self.watch)
        mean_float32(self.watch)

    def run(self, path: str, folder: Path) -> Result:
        """Run one epoch of a recipe with its files in `folder`, and return what was found."""
        recipe, less = cut(path, folder)
        result = Result(path, less)
        provide(recipe, self.hub, folder)
        gc.collect()
        self.watch.clear()
        try:
            with FakeCuda(self.watch):
                Trainer(recipe, make_accelerator()).train()
        except (Fault, RuntimeError, NotImplementedError) as error:
            result.fault = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-12)}"
        result.peaks = {name: size / GIB for name, size in self.watch.peaks.items()}
        result.plan = memory(recipe)
        result.synchronisations = {phase: dict(lines) for phase, lines in self.watch.syncs.items()}
        result.float32_products = {phase: dict(lines) for phase, lines in self.watch.products.items()}
        return result
