"""Steps that train: CPU against CUDA, the four kinds of runs, exact resume, compiled blocks, ways to save memory."""

import hashlib
import importlib.util
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import wraps
from pathlib import Path

import torch
from safetensors.torch import load_file

import nft.rollout
from nft.compilation import compilation
from nft.config import Recipe, load_recipe
from nft.cost.plan import memory, recipe_geometry, work
from nft.cost.shapes import costs
from nft.models import load_generator, make_policy
from nft.policy import ADAPTERS, Policy
from nft.rollout import plan_rollout, roll_out
from nft.trainer import Trainer
from stitchvm_reward.diffusion.prompt_cache import PromptCache
from stitchvm_reward.measure import compiled_graphs, compiled_regions
from stitchvm_reward.peaks import peak_teraflops
from stitchvm_reward.runs.launcher import make_accelerator
from stitchvm_reward.runs.tracking import read_metrics
from tests.gpu.setting import Findings, Setting, launched
from tests.tiny import RECIPE, TINY

GIB = 2**30
NO_GPU = "needs a GPU"
PEAK_RATIO = (0.9, 1.1)  # of the tracked peak and the plan
PHASES = ("rollout", "decode", "score", "audit", "train")


def _strict(function):
    """Let any wait for the GPU inside a function raise."""

    @wraps(function)
    def inside(*arguments, **named):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*arguments, **named)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return inside


@torch.no_grad()
def _randomise(policy: Policy) -> None:
    """Draw every adapter anew, each its own: fresh ones change nothing."""
    for number, name in enumerate(ADAPTERS):
        for index, tensor in enumerate(policy.tensors(name).values()):
            draw = torch.Generator().manual_seed(1000 * number + index)
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.05)


def _rollout_and_gradient(recipe: Recipe, device: torch.device, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latents of one micro batch and the adapters' gradient of a velocity there, both on the CPU."""
    generator = load_generator(recipe, device)
    policy = make_policy(recipe, generator)
    _randomise(policy)
    policy.copy("current", "old")
    cache = PromptCache(recipe.model, str(folder), device)
    cache.ensure(["a red cross, white background", "a blue circle"])
    table = cache.conditions(["a red cross, white background", "a blue circle"])
    planned = plan_rollout(generator, [0, 1], [0, 1], table=table, rows=[0, 1], seed=0, epoch=0)
    with policy.using("old"):
        steps = recipe.rollout.steps
        sigmas, stops = generator.sigmas(steps), [steps, steps]
        rollout = roll_out(generator, generator.transformer, planned, sigmas, solver="euler", stops=stops)
    level = torch.full((2,), 0.7, device=device)
    generator.velocity(rollout.anchor.detach(), level, rollout.conditions).square().mean().backward()
    gradient = torch.cat([t.grad.flatten() for t in policy.tensors("current").values() if t.grad is not None])
    return rollout.anchor.cpu(), gradient.cpu()


def cpu_cuda(setting: Setting) -> Findings:
    """Compare rollouts and gradients of the bundled miniature, in float32, on the CPU and on the GPU."""
    found, recipe = Findings(), load_recipe(RECIPE, [*TINY, f"out={setting.work / 'unused'}"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    on_cpu = _rollout_and_gradient(recipe, torch.device("cpu"), setting.work / "prompts-cpu")
    again = _rollout_and_gradient(recipe, torch.device("cpu"), setting.work / "prompts-cpu")
    found.check("the CPU repeats itself bit for bit", all(torch.equal(a, b) for a, b in zip(on_cpu, again)))
    found.check("the gradient is not zero", bool(on_cpu[1].abs().max() > 0))
    if not setting.cuda:
        found.skipped["rollouts and gradients on the GPU"] = NO_GPU
        return found
    on_gpu = _rollout_and_gradient(recipe, setting.device, setting.work / "prompts-gpu")
    for name, ours, theirs, most in zip(("rollouts", "gradients"), on_cpu, on_gpu, (1e-3, 1e-2)):
        apart = float((ours - theirs).norm() / ours.norm())
        found.check(f"{name} on the GPU differ from the CPU's by at most {most:g} of their norm", apart <= most, apart)
    return found


def _base(trainer: Trainer) -> dict[str, float]:
    """Return the sums of the frozen weights by name."""
    network = trainer.learner.generator.transformer
    return {name: float(p.double().sum()) for name, p in network.named_parameters() if "lora_" not in name}


def _watched(trainer: Trainer, found: Findings, run: str) -> None:
    """Check in every update that training moves `current` and leaves the base and `old` as they are."""
    learn, policy = trainer.objective.learn, trainer.learner.policy

    def watched(rollouts, epoch):
        # Copies on the CPU: the GPU's peak is compared with the plan.
        before = {name: [t.detach().cpu().clone() for t in policy.tensors(name).values()] for name in ADAPTERS}
        learned = learn(rollouts, epoch)
        same = {
            name: all(torch.equal(t.detach().cpu(), old) for t, old in zip(policy.tensors(name).values(), before[name]))
            for name in ADAPTERS
        }
        moved = same["old"] and not same["current"]
        found.check(f"{run}, epoch {epoch + 1}: the update moves current and not old", moved)
        return learned

    trainer.objective.learn = watched


def train(setting: Setting) -> Findings:
    """Run two epochs of every kind of run, and compare the peak of each with its plan."""
    found = Findings()
    if setting.cuda:
        nft.rollout.solve_each = _strict(nft.rollout.solve_each)
    else:
        found.skipped["no wait for the GPU inside solver steps"] = NO_GPU
        found.skipped["peak memory against the plan"] = NO_GPU
    peak, source = peak_teraflops(setting.device, torch.bfloat16 if setting.cuda else torch.float32)
    found.figures["peak TFLOP/s"] = f"{peak:.4g} ({source})"
    for run in ("full", "stopped", "draft", "draft_stopped"):
        recipe = load_recipe(setting.recipe(run), setting.overrides(run, run))
        if setting.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(recipe, make_accelerator())
        base = _base(trainer)
        _watched(trainer, found, run)
        found.check(f"{run}: reaches its last epoch", trainer.train())
        found.check(f"{run}: the base model is unchanged", _base(trainer) == base)
        rows = read_metrics(setting.work / run)
        found.check(f"{run}: every metric is finite", all(math.isfinite(v) for row in rows for v in row.values()))
        if run == "stopped":
            found.check("stopped: the value model is audited", any("audit/value" in row for row in rows))
        tflop = work(recipe, recipe_geometry(recipe, 1), costs(recipe))
        seconds = {name: sum(row.get(f"seconds/{name}", 0.0) for row in rows) for name in PHASES}
        found.figures[f"{run}: share of peak"] = {
            name: round(recipe.epochs * tflop[name] / seconds[name] / peak, 4)
            for name in PHASES
            if tflop.get(name) and seconds[name]
        }
        if setting.cuda:
            planned = max(memory(recipe, costs(recipe)).values())
            ratio = torch.cuda.max_memory_allocated() / GIB / planned
            found.check(f"{run}: peak within 10% of the plan", PEAK_RATIO[0] <= ratio <= PEAK_RATIO[1], round(ratio, 3))
        del trainer
    return found


def _digests(run: Path, epoch: int) -> dict[str, str]:
    folder = run / "checkpoints" / f"epoch-{epoch:06d}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _interrupted(command: list[str], run: Path) -> bool:
    """Send SIGTERM in the middle of the second epoch; return whether it was still running then."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 2):
        time.sleep(0.02)
    time.sleep(0.3)
    alive = process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=300)
    return alive


def resume(setting: Setting) -> Findings:
    """Compare a straight run, one that is continued and one that a signal interrupts: bit for bit the same."""
    found = Findings()
    run = "stopped"  # a gradient through bicubic resizing has no deterministic kernel; this run has none

    def arguments(out: str, *more: str) -> list[str]:
        settings = setting.overrides(run, out, "model.deterministic=true", "checkpoint.keep=3", "audit.every=0", *more)
        return ["launch/nft.py", setting.recipe(run), *settings]

    for out, more in (("straight", ("epochs=3",)), ("parts", ("epochs=1",)), ("parts", ("epochs=3",))):
        code, told = launched([], *arguments(out, *more))
        found.check(f"{out} {' '.join(more)} ends well", code == 0, None if code == 0 else told)
    signalled = _interrupted([sys.executable, *arguments("signalled", "epochs=3")], setting.work / "signalled")
    found.check("the signal met a running epoch", signalled)
    code, told = launched([], *arguments("signalled", "epochs=3"))
    found.check("the interrupted run continues", code == 0, None if code == 0 else told)
    if all(found.checks.values()):
        straight = _digests(setting.work / "straight", 3)
        for out in ("parts", "signalled"):
            found.check(f"{out}: bit for bit the straight run", _digests(setting.work / out, 3) == straight)
    return found


def compiled(setting: Setting) -> Findings:
    """Compile the blocks: every adapter and a training pass, no recompilation in a second round, and as eager does."""
    found, most = Findings(), 2e-2
    recipe = load_recipe(setting.recipe("full"), setting.overrides("full", "unused"))
    generator = load_generator(recipe, setting.device)
    policy = make_policy(recipe, generator)
    _randomise(policy)
    cache = PromptCache(recipe.model, recipe.prompts.cache, setting.device)
    cache.ensure(["a red cross"])
    batch = recipe.rollout.micro_batch
    conditions = cache.conditions(["a red cross"] * batch)
    torch.manual_seed(0)
    latents = torch.randn(batch, *generator.latent_shape, device=setting.device)
    level = torch.full((batch,), 0.7, device=setting.device)

    def velocities() -> list[torch.Tensor]:
        outputs = []
        for adapter in (None, "old", "ema"):
            with torch.no_grad(), policy.using(adapter):
                outputs.append(generator.velocity(latents, level, conditions).float())
        outputs.append(generator.velocity(latents, level, conditions).float())
        outputs[-1].square().mean().backward()
        return [output.detach() for output in outputs]

    decided = compilation(replace(recipe.model, compile=None), setting.device)
    found.check("blocks are compiled by default where there is a GPU", decided.on == setting.cuda, decided.line())
    eager = velocities()
    if setting.cuda:
        generator.compile_blocks()
    else:
        generator.compile_blocks(backend="aot_eager")
        found.skipped["code generation by inductor"] = NO_GPU
    velocities()
    graphs, blocks = compiled_graphs(), len(generator.blocks)
    again = velocities()
    found.check("graphs were compiled", graphs > 0, graphs)
    found.check("a second round compiles nothing", compiled_graphs() == graphs, compiled_graphs())
    regions = compiled_regions(velocities)
    found.check("every block is one compiled region, without a graph break", regions == 4 * blocks, regions)
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(again, eager))
    found.check(f"velocities are within {most:g} of eager", apart <= most, apart)
    return found


def _adapters(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/epoch-000001/adapters.safetensors")


def _apart(first: Path, second: Path) -> float:
    ours, theirs = _adapters(first), _adapters(second)
    current = [key for key in ours if key.startswith("current/")]
    return max(float((ours[key] - theirs[key]).abs().max()) for key in current)


def options(setting: Setting) -> Findings:
    """Train one epoch in every way that saves memory, and on several cards where there are several."""
    found = Findings()
    optional = {"adamw_8bit": "bitsandbytes", "zero": "deepspeed"}
    absent = {name for name, package in optional.items() if importlib.util.find_spec(package) is None}

    def train_once(out: str, *more: str, start: tuple[str, ...] = ()) -> bool:
        settings = setting.overrides("full", out, "epochs=1", *more)
        code, told = launched(list(start), "launch/nft.py", setting.recipe("full"), *settings)
        found.check(f"{out} trains", code == 0, None if code == 0 else told)
        return code == 0

    train_once("plain")
    saving = ["train.gradient_checkpointing=true", "model.vae_slicing=true", "model.vae_dtype=bfloat16"]
    if "adamw_8bit" in absent:
        found.skipped["8-bit moments"] = "bitsandbytes is not installed"
    else:
        saving.append("train.optimizer=adamw_8bit")
    train_once("saving", *saving)
    rate = load_recipe(setting.recipe("full"), setting.overrides("full", "unused")).train.learning_rate
    for stage in (1, 2, 3):
        name = f"zero{stage}"
        if "zero" in absent:
            found.skipped[name] = "deepspeed is not installed"
        elif not setting.cuda and stage < 3:
            found.skipped[name] = "tests/distributed runs it on CPUs"
        else:
            config = ("--config_file", f"launch/accelerate/{name}.yaml", "--num_processes", "1")
            if train_once(name, start=("-m", "accelerate.commands.launch", *config)):
                apart = _apart(setting.work / name, setting.work / "plain")
                found.check(f"{name} is within a step's size of one process", apart <= 2 * rate, apart)
    if torch.cuda.device_count() < 2:
        found.skipped["DDP against one process"] = "needs two GPUs"
    elif train_once("ddp", start=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")):
        apart = _apart(setting.work / "ddp", setting.work / "plain")
        found.check("DDP is within a step's size of one process", apart <= 2 * rate, apart)
    found.figures["losses"] = {
        path.parent.name: [row.get("train/policy_loss") for row in map(json.loads, path.read_text().splitlines())][-1]
        for path in (setting.work / name / "metrics.jsonl" for name in ("plain", "saving"))
        if path.exists()
    }
    return found
