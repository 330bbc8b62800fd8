"""What adapters add to a forward pass, from shapes: python -m nft.cost.traffic RECIPE [key=value ...]"""

import argparse
import sys

import torch

from nft.config import Recipe, load_recipe
from nft.policy import Policy
from stitchvm_reward.command import run_command
from stitchvm_reward.diffusion.generator import chosen_guidance
from stitchvm_reward.families import architecture_of
from stitchvm_reward.measure import Traffic, fused_attention

BATCH = 8


def forward_traffic(recipe: Recipe, batch: int = BATCH) -> dict[str, Traffic]:
    """Return the traffic of a forward of `batch` samples: without adapters, by `old` and, with gradient, by `current`.

    The passes run on the meta device at the recipe's shapes; nothing is loaded.
    """
    model, lora = recipe.model, recipe.lora
    architecture = architecture_of(model.path)
    family = architecture.family
    guidance = chosen_guidance(family, architecture.transformer, model.guidance, model.path)
    found = {}
    with torch.device("meta"):
        network = family.transformer.from_config(architecture.transformer).to(model.torch_dtype).requires_grad_(False)
        policy = Policy(network, lora.rank, lora.alpha, lora.targets or list(family.lora_targets), recipe.seed)
        conditions = family.stand_in(architecture, batch, model.text_length).to(network.device, model.torch_dtype)
        latents = torch.zeros(batch, *architecture.latent_shape(model.resolution), dtype=model.torch_dtype)
        inputs = family.inputs(latents, torch.zeros(batch), conditions, guidance)
        for name, adapter in (("no adapter", None), ("old", "old"), ("current, with gradient", "current")):
            gradient = torch.set_grad_enabled(adapter == "current")
            with gradient, policy.using(adapter), fused_attention(), Traffic() as found[name]:
                network(**inputs)
    return found


def lines(recipe: Recipe) -> list[str]:
    """Return the table that the command prints."""
    found = forward_traffic(recipe)
    base = found["no adapter"].bytes
    table = [f"{f'a forward of {BATCH} samples':28}{'GB moved':>10}{'more':>8}{'float32 GFLOP':>15}"]
    for name, traffic in found.items():
        more = traffic.bytes / base - 1
        table.append(f"{name:28}{traffic.bytes / 1e9:10.1f}{more:8.1%}{traffic.float32_flops / 1e9:15.1f}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nft.cost.traffic", description=__doc__)
    parser.add_argument("recipe", help="a training recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to set")
    arguments = parser.parse_args()
    return run_command(lambda: print("\n".join(lines(load_recipe(arguments.recipe, arguments.overrides)))))


if __name__ == "__main__":
    sys.exit(main())
