"""Steps that use the public commands: stitching, steering, export and sampling, and the benchmark."""

import json
from functools import partialmethod
from pathlib import Path

from torch import nn

from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.stitching.value_model import ValueNetwork
from tests.gpu.setting import Findings, Setting, command

PROMPT = "a red cross, white background"
WANTED = {"training level": 0.45, "rollout step": 0.50, "stitched score of Tweedie's": 0.20}


def stitch(setting: Setting) -> Findings:
    """Search the best pair of blocks and fine-tune one epoch, with launch/stitch.py."""
    found = Findings()
    recipe = "recipes/stitch/sd35m_aesthetic.yaml" if setting.cuda else "recipes/stitch/shapes_aesthetic.yaml"
    code = command(
        "stitch",
        recipe,
        f"model.path={setting.model}",
        f"reward.model={setting.clip}",
        f"reward.head={setting.head}",
        f"data.images={setting.images}",
        f"data.cache={setting.work / 'targets'}",
        f"out={setting.work / 'stitch'}",
        "data.held_out=8",
        "search.probe=24",
        "search.held_out=8",
        "search.last_reward_block=2",
        "finetune.epochs=1",
        "finetune.batch=16",
        "finetune.micro_batch=8",
        "finetune.warmup=2",
        "evaluation.sigmas=[0.5]",
        "tracking=[jsonl]",
    )
    found.check("launch/stitch.py ends well", code == 0)
    found.check("the value model is written", (setting.value_model / "config.json").is_file())
    return found


def steer(setting: Setting) -> Findings:
    """Best of N, FK and DPS by a stitched value, and DPS by images, with launch/sample.py and planned micro batches."""
    found = Findings()
    value = f"rewards=[{{kind: value, value_model: {setting.value_model}}}]"
    pixel = f"rewards=[{{kind: aesthetic, model: {setting.clip}, head: {setting.head}}}]"
    recipe = "recipes/steer/sd35m.yaml" if setting.cuda else "recipes/steer/shapes.yaml"
    small = ["steps=4", "micro_batch=null", "fk.particles=2", "fk.window=[1,3]", "fk.every=1", "best_of_n.particles=2"]
    side = 512 if setting.cuda else 64
    for method, reward, name in (
        ("best_of_n", value, "best of N"),
        ("fk", value, "FK"),
        ("dps", value, "DPS"),
        ("dps", pixel, "DPS through the decoder"),
    ):
        grid = setting.work / f"{name.replace(' ', '-')}.png"
        code = command(
            "sample",
            *(setting.model, "--prompts", PROMPT, "--resolution", side, "--grid", grid, "--steer", method),
            *("--steering", recipe, "--set", *small, reward),
        )
        found.check(f"{name} draws its pictures", code == 0 and grid.is_file())
    return found


def export(setting: Setting) -> Findings:
    """Export the trained adapter of step `train` and sample with it."""
    found, out = Findings(), setting.work / "exported"
    code = command("export", setting.work / "full", "--out", out, "--replace")
    files = sorted(out.glob("*.safetensors"))
    found.check("launch/export.py writes a LoRA file", code == 0 and bool(files))
    grid, side = setting.work / "tuned.png", 512 if setting.cuda else 64
    for file in files[:1]:
        code = command(
            "sample",
            *(setting.model, "--prompts", PROMPT, "--lora", file, "--steps", 4),
            *("--resolution", side, "--grid", grid),
        )
    found.check("launch/sample.py draws base beside tuned", code == 0 and grid.is_file())
    return found


def _shares(path: Path) -> dict[str, float]:
    rows = json.loads(path.read_text())["rows"]
    return {row["phase"]: round(row["share"], 4) for row in rows if row["phase"] in WANTED}


def benchmark(setting: Setting) -> Findings:
    """Measure a training recipe, eager and compiled, and a stitched score against Tweedie's."""
    found = Findings()
    recipe = "recipes/aesthetic_pixel.yaml" if setting.cuda else "recipes/shapes/aesthetic.yaml"
    small = [] if setting.cuda else ["rollout.micro_batch=2", "model.text_length=5"]
    if not setting.cuda:
        Generator.compile_blocks = partialmethod(Generator.compile_blocks, backend="aot_eager")  # type: ignore
        ValueNetwork.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore
        found.skipped["code generation by inductor"] = "needs a GPU"
        found.skipped["the shares that are wanted"] = "they are for a GPU"
    wanted: dict[str, dict[str, float]] = {}
    for name, compile_blocks in (("eager", "false"), ("compiled", "true")):
        out = setting.work / f"benchmark-{name}.json"
        code = command(
            "benchmark", recipe, *small, f"model.compile={compile_blocks}", "--repeats", 3 if setting.cuda else 1,
            "--out", out,
        )  # fmt: skip
        found.check(f"the {name} benchmark ends well", code == 0)
        if code == 0:
            found.figures[f"{name}: share of peak"] = wanted[name] = _shares(out)
    stitching = "recipes/stitch/sd35m_aesthetic.yaml" if setting.cuda else "recipes/stitch/shapes_aesthetic.yaml"
    scores = setting.work / "benchmark-scores.json"
    code = command("benchmark", stitching, "--repeats", 3 if setting.cuda else 1, "--out", scores)
    found.check("the benchmark of scores ends well", code == 0)
    if code == 0:
        stitched, tweedie = json.loads(scores.read_text())["scores"]
        ratio = stitched["milliseconds"] / tweedie["milliseconds"]
        found.figures["stitched score of Tweedie's"] = round(ratio, 4)
        if setting.cuda:
            met = {"stitched score of Tweedie's": ratio <= WANTED["stitched score of Tweedie's"]}
            for name, shares in wanted.items():
                met |= {f"{phase}, {name}": share >= WANTED[phase] for phase, share in shares.items()}
            found.figures["wanted"] = met
    return found
