"""Shared by the tests that train: runs of the bundled miniature that are small enough to take seconds."""

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import RECIPE, ROOT, TINY, few_prompts

# These tests are for the CPU: several processes must not be sent to one card.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(name, value)

# Of several pytest workers each keeps to a core, with the processes that it starts: threads of two that share cores
# wait for each other most of the time.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

STITCH = {"aesthetic": "recipes/stitch/shapes_aesthetic.yaml", "clip": "recipes/stitch/shapes_clip.yaml"}


@pytest.fixture(scope="session", autouse=True)
def at_the_root():
    """Recipes name their files from the root of the repository."""
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def overrides(tmp_path_factory) -> Callable[..., list[str]]:
    """overrides(out, "key=value", ...) -> everything that makes the recipe tiny, with embeddings shared by all runs."""
    prompts = few_prompts(tmp_path_factory.mktemp("prompts"))
    return lambda out, *more: [*TINY, *prompts, f"out={out}", *more]


@pytest.fixture(scope="session")
def make_trainer(overrides) -> Callable[..., Any]:
    """make_trainer(out, "key=value", ..., recipe=PATH) -> a Trainer of the tiny recipe in this process."""

    def make(out: Path, *more: str, recipe: str = RECIPE):
        from nft.config import load_recipe
        from nft.trainer import Trainer
        from stitchvm_reward.runs.launcher import make_accelerator

        return Trainer(load_recipe(recipe, overrides(out, *more)), make_accelerator())

    return make


@pytest.fixture(scope="session")
def train(make_trainer) -> Callable[..., Any]:
    """train(out, "key=value", ..., recipe=PATH) -> the Trainer after its last epoch."""

    def run(out: Path, *more: str, recipe: str = RECIPE):
        trainer = make_trainer(out, *more, recipe=recipe)
        trainer.train()
        return trainer

    return run


@pytest.fixture(scope="session")
def command(overrides) -> Callable[..., list[str]]:
    """command(out, "key=value", ...) -> the command line that starts this run in a process of its own."""
    return lambda out, *more: [sys.executable, "launch/nft.py", RECIPE, *overrides(out, *more)]


@pytest.fixture(scope="session")
def trained_run(train, tmp_path_factory) -> tuple[Any, Path]:
    """The trainer and the folder of a run whose pictures are visibly others than the base's. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained") / "shapes-run"
    settings = ("epochs=2", "train.updates_per_epoch=2", "train.learning_rate=5e-3", "evaluation.every=1")
    return train(folder, *settings, "checkpoint.keep=2"), folder


@pytest.fixture
def launched(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """launched("export", argument, ...) -> exit code, standard output and error of launch/export.py, run in here."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", [f"launch/{name}.py", *map(str, arguments)])
        specification = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
        assert specification is not None and specification.loader is not None
        command = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(command)
        capfd.readouterr()
        return command.main(), *capfd.readouterr()

    return run


@pytest.fixture(scope="session")
def sampled() -> Callable[..., Any]:
    """sampled(pipeline, prompts, noise, steps) -> pictures (count, 3, 64, 64) of a miniature pipeline of diffusers."""

    def run(pipeline, prompts: list[str], noise, steps: int):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            prompts,
            num_inference_steps=steps,
            guidance_scale=1.0,
            height=64,
            width=64,
            latents=noise,
            max_sequence_length=13,
            output_type="pt",
        ).images

    return run


@pytest.fixture(scope="session")
def digests() -> Callable[[Path, int], dict[str, str]]:
    """digests(run, epoch) -> the hash of every file of that checkpoint: equal means bit for bit."""

    def of(run: Path, epoch: int) -> dict[str, str]:
        folder = run / "checkpoints" / f"epoch-{epoch:06d}"
        found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
        assert {"adapters.safetensors", "optimizer.safetensors", "state.json"} <= found.keys()
        return found

    return of


@pytest.fixture(scope="session")
def rows() -> Callable[[Path], list[dict[str, float]]]:
    """rows(run) -> its metrics, one dictionary an epoch, without what the clock says."""

    def of(run: Path) -> list[dict[str, float]]:
        whole = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        timed = ("seconds/", "images_per_second")
        return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in whole]

    return of


@pytest.fixture(scope="session")
def adapters() -> Callable[[Path, int], dict[str, Any]]:
    """adapters(run, epoch) -> the tensors ADAPTER/LAYER.lora_X of that checkpoint."""

    def of(run: Path, epoch: int) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(run / "checkpoints" / f"epoch-{epoch:06d}" / "adapters.safetensors")

    return of


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    from miniature.images import write

    folder = tmp_path_factory.mktemp("images")
    write(72, folder)
    (folder / "empty.png").write_bytes(b"")
    (folder / "torn.png").write_bytes((folder / "00000.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="session")
def small_stitch(image_folder) -> list[str]:
    """What makes a stitching recipe tiny."""
    return [
        f"data.images={image_folder}",
        "data.held_out=8",
        "search.probe=24",
        "search.held_out=8",
        "search.last_reward_block=2",
        "finetune.epochs=2",
        "finetune.batch=16",
        "finetune.micro_batch=8",
        "finetune.warmup=2",
        "evaluation.sigmas=[0.25]",
        "checkpoint.every=1",
    ]


@pytest.fixture(scope="session")
def stitch(small_stitch, tmp_path_factory):
    """stitch(kind, out, "key=value", ...) -> the folder of a value model of that reward kind."""
    from stitchvm_reward.runs.launcher import make_accelerator
    from stitchvm_reward.stitching.build import build
    from stitchvm_reward.stitching.config import load_stitch_recipe

    cache = tmp_path_factory.mktemp("targets")

    def run(kind: str, out: Path, *more: str, only_search: bool = False) -> Path:
        recipe = load_stitch_recipe(STITCH[kind], [*small_stitch, f"data.cache={cache}", f"out={out}", *more])
        return build(recipe, make_accelerator(), only_search)

    return run


@pytest.fixture(scope="session")
def aesthetic_folder(stitch, tmp_path_factory) -> Path:
    return stitch("aesthetic", tmp_path_factory.mktemp("stitch") / "aesthetic", "backbone.block=2", "reward.block=1")


@pytest.fixture(scope="session")
def clip_folder(stitch, tmp_path_factory) -> Path:
    return stitch("clip", tmp_path_factory.mktemp("stitch") / "clip", "backbone.block=3", "reward.block=2")
