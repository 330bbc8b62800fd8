"""The audit at work: silent on the bundled value model, and a broken one stops the run within three audits."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stitchvm_reward.errors import InputError

RECIPE = "recipes/shapes/stopped.yaml"
VALUE_MODEL = "miniature/weights/value/aesthetic"
# As the recipe is, its own prompts and thresholds, but audited every epoch and hardly evaluated.
AS_SHIPPED = (
    "prompts.train=miniature/prompts/train.txt",
    "rollout.steps=10",
    "rollout.groups=8",
    "rollout.group_size=8",
    "rollout.micro_batch=32",
    "audit.every=1",
    "epochs=3",
)


def shuffled(folder, seed):
    """The bundled value model with the blocks of its tail in another order."""
    shutil.copytree(VALUE_MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    blocks = sorted({int(found[1]) for name in tensors if (found := re.search(r"tail\.layers\.(\d+)\.", name))})
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    assert order != sorted(order)
    moved = {}
    for name, tensor in tensors.items():
        found = re.search(r"tail\.layers\.(\d+)\.", name)
        place = name if found is None else name.replace(found[0], f"tail.layers.{blocks[order[int(found[1])]]}.")
        moved[place] = tensor
    save_file(moved, folder / "model.safetensors")
    return folder


@pytest.mark.slow
def test_the_bundled_value_model_passes_its_audits(train, tmp_path, rows, capfd):
    train(tmp_path / "run", *AS_SHIPPED, recipe=RECIPE)
    found = rows(tmp_path / "run")[1:]
    assert len(found) == 3 and all(row["audit/spearman"] > 0.5 for row in found)
    assert "warning: audit" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "told"), [(0, "the true reward changes"), (1, "the value model's rank correlation")])
def test_a_value_model_with_its_blocks_shuffled_stops_the_run_within_three_audits(train, tmp_path, seed, told):
    """The first order ranks latents nearly as well as the right one: its scale gives it away."""
    value = f"rewards=[{{kind: value, value_model: {shuffled(tmp_path / 'broken', seed)}}}]"
    with pytest.raises(InputError, match=rf"audit in epoch [123]: {told} .*stops here"):
        train(tmp_path / "run", *AS_SHIPPED, value, recipe=RECIPE)
    assert not list((tmp_path / "run" / "checkpoints").glob("epoch-000003"))
