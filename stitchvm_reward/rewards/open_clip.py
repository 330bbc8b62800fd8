"""Convert weights in open_clip's layout, such as HPS_v2.1_compressed.pt, to a folder for a reward's `model`.

python -m stitchvm_reward.rewards.open_clip FILE.pt OUT --tokenizer FOLDER_OR_HUB_ID

The shapes of the tensors determine the configuration except for two things. The number of attention heads follows
from open_clip's own model list: heads are 64 wide, except in vision towers of the widths in VISION_HEAD_WIDTHS. The
activation must be given: gelu for models trained by open_clip (LAION's, HPSv2), quick_gelu for OpenAI's and DFN-CLIP.
"""

import argparse
import itertools
import math
import re
import shutil
import sys
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from stitchvm_reward.command import run_command
from stitchvm_reward.errors import InputError
from stitchvm_reward.files import staged
from stitchvm_reward.hub import locate
from stitchvm_reward.rewards.clip import load_tokenizer

# Exceptions that reading a file of another kind may raise.
FAULTS = (
    OSError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    EOFError,
    SafetensorError,
    UnpicklingError,
)
ACTIVATIONS = ("gelu", "quick_gelu")
HEAD_WIDTH = 64
VISION_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # ViT-H, -g, -bigG, -e
BUFFERS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")

NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
TRANSPOSED = ("text_projection", "visual.proj")
TEXT_BLOCKS, VISION_BLOCKS = "transformer.resblocks", "visual.transformer.resblocks"
LAYERS = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the named tensors of a file in open_clip's layout: .safetensors, or a pickle of tensors without code.

    They may be stored under `state_dict`, with names that begin with `module.`. Raises InputError for anything else.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}; give open_clip weights as .pt or .safetensors")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FAULTS as error:
        # Only the first sentence: the next one advises to run the code.
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
        raise InputError(f"{path} cannot be read as tensors, and code in it is never run: {reason}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold named tensors, got a {type(content).__name__}")
    state = {str(name).removeprefix("module."): value for name, value in content.items()}
    state = {name: value for name, value in state.items() if name not in BUFFERS}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{path} must hold only tensors, {name} is a {type(value).__name__}")
    return state


def _shape(state: dict[str, Tensor], name: str, dimensions: int) -> list[int]:
    if name not in state:
        raise InputError(f"missing: {name}; only open_clip's CLIP with two plain transformers is converted")
    if state[name].ndim != dimensions:
        raise InputError(f"{name} must have {dimensions} dimensions, got shape {tuple(state[name].shape)}")
    return list(state[name].shape)


def _tower(state: dict[str, Tensor], blocks: str, width: int, head_width: int, activation: str) -> dict:
    numbers = {match[1] for name in state if (match := re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\..+", name))}
    if not numbers:
        raise InputError(f"missing: {blocks}.0; only open_clip's CLIP with two plain transformers is converted")
    if width % head_width:
        raise InputError(f"the width of {blocks} must be a multiple of {head_width}, its heads' width, got {width}")
    return {
        "hidden_size": width,
        "intermediate_size": _shape(state, f"{blocks}.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": len(numbers),
        "num_attention_heads": width // head_width,
        "hidden_act": activation,
    }


def configuration(state: dict[str, Tensor], activation: str) -> CLIPConfig:
    """Return the configuration that the tensors' shapes imply. Raises InputError for missing or misshapen tensors."""
    width, channels, patch, _ = _shape(state, "visual.conv1.weight", 4)
    positions = _shape(state, "visual.positional_embedding", 2)[0]
    grid = math.isqrt(max(positions - 1, 0))
    if not grid or grid * grid != positions - 1:
        raise InputError(f"visual.positional_embedding must hold one more than a square of positions, got {positions}")
    vocabulary, text_width = _shape(state, "token_embedding.weight", 2)
    head = VISION_HEAD_WIDTHS.get(width, HEAD_WIDTH)
    vision = _tower(state, VISION_BLOCKS, width, head, activation)
    text = _tower(state, TEXT_BLOCKS, text_width, HEAD_WIDTH, activation)
    vision |= {"image_size": grid * patch, "patch_size": patch, "num_channels": channels}
    text |= {
        "vocab_size": vocabulary,
        "max_position_embeddings": _shape(state, "positional_embedding", 2)[0],
    }
    projection = _shape(state, "visual.proj", 2)[1]
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection)
    config.architectures = ["CLIPModel"]
    return config


def _targets(config: CLIPConfig) -> dict[str, tuple[str, ...]]:
    """Return the names in CLIPModel of each tensor in open_clip's layout; fused attention weights have three."""
    names: dict[str, tuple[str, ...]] = {source: (target,) for source, target in NAMES.items()}
    for source, target, depth in (
        (TEXT_BLOCKS, "text_model.encoder.layers", config.text_config.num_hidden_layers),
        (VISION_BLOCKS, "vision_model.encoder.layers", config.vision_config.num_hidden_layers),
    ):
        for number, part in itertools.product(range(depth), ("weight", "bias")):
            ours, theirs = f"{target}.{number}", f"{source}.{number}"
            names[f"{theirs}.attn.in_proj_{part}"] = tuple(f"{ours}.self_attn.{x}_proj.{part}" for x in "qkv")
            names |= {f"{theirs}.{a}.{part}": (f"{ours}.{b}.{part}",) for a, b in LAYERS.items()}
    return names


def _listed(names: set[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def convert(state: dict[str, Tensor], activation: str = "gelu") -> tuple[CLIPConfig, dict[str, Tensor]]:
    """Return the configuration and the tensors of a CLIPModel that computes what open_clip computes with `state`.

    Number formats are kept. Raises InputError for tensors that are missing, unknown or of the wrong shape.
    """
    config = configuration(state, activation)
    targets = _targets(config)
    for what, off in (("missing", targets.keys() - state.keys()), ("unknown", state.keys() - targets.keys())):
        if off:
            raise InputError(f"{what}: {_listed(off)}; only open_clip's CLIP with two plain transformers is converted")
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in CLIPModel(config).state_dict().items()}
    converted: dict[str, Tensor] = {}
    for source, names in targets.items():
        tensor, fits = state[source], wanted[names[0]]
        if source in TRANSPOSED:
            fits = fits[::-1]
        elif len(names) > 1:
            fits = (fits[0] * len(names), *fits[1:])
        elif source == "logit_scale" and tensor.numel() == 1:  # newer files store it with one dimension
            tensor = tensor.reshape(())
        if tuple(tensor.shape) != fits:
            raise InputError(f"{source} must have shape {fits} to fit the others, got {tuple(tensor.shape)}")
        parts = (tensor.T,) if source in TRANSPOSED else tensor.chunk(len(names)) if len(names) > 1 else (tensor,)
        converted |= {n: p.clone(memory_format=torch.contiguous_format) for n, p in zip(names, parts, strict=True)}
    return config, converted


def set_tokens(config: CLIPConfig, tokenizer: CLIPTokenizer, name: str) -> None:
    """Write the tokenizer's special tokens into the configuration, so that texts end where they do in open_clip.

    open_clip reads a text's embedding at its largest token id, transformers at its first end token. These are the same
    if the end token is the last entry of the vocabulary. Raises InputError if it is not.
    """
    size, end = config.text_config.vocab_size, tokenizer.eos_token_id
    if len(tokenizer) != size or end != size - 1:
        raise InputError(
            f"the tokenizer must have {size} entries, as the model does, the last one the end token; {name} has "
            f"{len(tokenizer)} entries and its end token is number {end}: give the tokenizer of a similar CLIP model"
        )
    config.text_config.eos_token_id = end
    config.text_config.bos_token_id = tokenizer.bos_token_id
    config.text_config.pad_token_id = tokenizer.pad_token_id


def convert_file(path: Path, out: Path, tokenizer: str, activation: str = "gelu") -> CLIPConfig:
    """Write the folder `out`, whole or not at all, and return its configuration.

    Raises InputError for an unusable file or tokenizer, and if `out` exists or cannot be written.
    """
    if out.exists():
        raise InputError(f"{out} already exists; give the name of a new folder")
    source = locate(tokenizer, ("*.txt",))
    words = load_tokenizer(source)
    config, tensors = convert(read_state(path), activation)
    set_tokens(config, words, tokenizer)
    try:
        with staged(out) as folder:
            folder.mkdir()
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(folder)
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out}: {str(error).splitlines()[0]}") from None
    return config


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stitchvm_reward.rewards.open_clip",
        description="Convert CLIP weights in open_clip's layout to a folder for a reward's `model`.",
        epilog="Example: python -m stitchvm_reward.rewards.open_clip HPS_v2.1_compressed.pt models/hpsv2.1 "
        "--tokenizer openai/clip-vit-large-patch14",
    )
    parser.add_argument("file", type=Path, help="weights: .pt (tensors only; code is refused) or .safetensors")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of a CLIP model with the same vocabulary")
    parser.add_argument(
        "--activation",
        choices=ACTIVATIONS,
        default="gelu",
        help="gelu (default) for open_clip's own models, LAION's and HPSv2; quick_gelu for OpenAI's and DFN's models",
    )
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    config = convert_file(
        arguments.file.expanduser(), arguments.out.expanduser(), arguments.tokenizer, arguments.activation
    )
    vision, text = config.vision_config, config.text_config
    print(
        f"{arguments.out}: vision {vision.num_hidden_layers} blocks of width {vision.hidden_size}, "
        f"{vision.image_size} px in patches of {vision.patch_size}; text {text.num_hidden_layers} blocks "
        f"of width {text.hidden_size}; {arguments.activation}"
    )


def main() -> int:
    return run_command(lambda: run(parse()))


if __name__ == "__main__":
    sys.exit(main())
