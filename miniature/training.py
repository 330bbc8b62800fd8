"""The resumable loop that every part of the miniature world is pretrained with."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

Step = Callable[[int, torch.Generator], tuple[torch.Tensor, dict[str, float]]]


def learning_rate(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up, then half a cosine down to `floor`, as a factor of the peak rate."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Average:
    """Exponential moving average of a module's parameters; `copy_to` puts it in place of them."""

    def __init__(self, module: torch.nn.Module, decay: float):
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.shadow.values()), [parameters[n] for n in self.shadow], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])


def train(
    name: str,
    module: torch.nn.Module,
    step_loss: Step,
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    folder: Path,
    *,
    warmup: int = 100,
    average: float = 0.0,
    save_every: int = 250,
    every: Callable[[int, torch.nn.Module], dict[str, float]] | None = None,
    evaluate_every: int = 500,
    stop_at: int | None = None,
) -> torch.nn.Module:
    """Train `module` for `steps` optimizer steps and return it with its averaged weights in place.

    `step_loss(step, generator)` gets a generator seeded by the step alone, so a run that was interrupted and
    goes on from `folder/NAME.pt` sees the data an unbroken run sees. `stop_at` ends early without changing the
    schedule. Raises FloatingPointError when the loss is not finite.
    """
    path = folder / f"{name}.pt"
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    shadow, start = Average(module, average), 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        module.load_state_dict(state["module"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        shadow.shadow, start = state["average"], state["step"]
    bar = tqdm(total=steps, initial=start, desc=name, mininterval=5, dynamic_ncols=True)
    for step in range(start, min(steps, stop_at or steps)):
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * learning_rate(step, steps, warmup)
        loss, shown = step_loss(step, torch.Generator().manual_seed(step))
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"{name}: the loss is {loss.item()} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        shadow.update(module, step)
        bar.update()
        bar.set_postfix({"loss": f"{loss.item():.4f}", **{k: f"{v:.3f}" for k, v in shown.items()}})
        done = step + 1
        if done % save_every == 0 or done == steps:
            folder.mkdir(parents=True, exist_ok=True)
            state = {"module": module.state_dict(), "average": shadow.shadow, "step": done}
            torch.save(state | {"optimizers": [o.state_dict() for o in optimizers]}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        if every is not None and (done % evaluate_every == 0 or done == steps):
            raw = {n: p.detach().clone() for n, p in module.named_parameters()}
            shadow.copy_to(module)
            result = every(done, module)
            tqdm.write(f"{name} {done}: " + "  ".join(f"{k} {v:.4f}" for k, v in result.items()))
            with torch.no_grad():
                for n, p in module.named_parameters():
                    p.copy_(raw[n])
    bar.close()
    shadow.copy_to(module)
    return module
