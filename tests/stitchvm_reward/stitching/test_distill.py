"""Finetuning: its losses, what it trains, and that it resumes and does not depend on the micro batch."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from stitchvm_reward.errors import InputError
from stitchvm_reward.rewards.aesthetic import AestheticHead
from stitchvm_reward.stitching.distill import aesthetic_loss, clip_loss, draw_sigma
from stitchvm_reward.stitching.value_model import StitchedValueModel

CUT = ("backbone.block=2", "reward.block=1")


def weights(folder):
    return load_file(folder / "model.safetensors")


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_clip_loss_is_the_squared_distance_of_embeddings_and_of_tokens():
    states, wanted = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), torch.zeros(1, 2, 2)
    embedding, target = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]])
    # |(.6, .8) - (1, 0)|^2 = .8; the tokens' mean square is 5 / 4
    torch.testing.assert_close(clip_loss(states, embedding, wanted, target, 1.0), torch.tensor([2.05]))
    torch.testing.assert_close(clip_loss(states, embedding, wanted, target, 0.0), torch.tensor([0.8]))


def test_the_aesthetic_loss_is_smooth_l1_on_tokens_embedding_and_score():
    head = AestheticHead(2).eval()
    states, wanted = torch.tensor([[[2.0, 0.5]]]), torch.zeros(1, 1, 2)
    embedding, target = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.6, 0.8]])
    # smooth L1 of 2 is 1.5, of .5 is .125; embedding and score agree
    found = aesthetic_loss(states, embedding, wanted, target, 1.0, head=head)
    torch.testing.assert_close(found, torch.tensor([(1.5 + 0.125) / 2]))
    assert aesthetic_loss(states, -embedding, wanted, target, 1.0, head=head) > found


def test_noise_levels_are_dense_in_the_middle():
    sigma = draw_sigma(20_000, torch.Generator().manual_seed(0), 0.0, 1.0)
    assert float(sigma.min()) > 0 and float(sigma.max()) < 1
    middle = ((sigma > 0.4) & (sigma < 0.6)).float().mean()
    edge = ((sigma < 0.1) | (sigma > 0.9)).float().mean()
    assert float(middle) > 4 * float(edge)


def test_finetuning_moves_layer_and_tail_and_leaves_the_rest(stitch, tmp_path, aesthetic_folder):
    folder = stitch("aesthetic", tmp_path / "run", *CUT, "finetune.learning_rate=1e-30", "finetune.epochs=1")
    before, after = weights(folder), weights(aesthetic_folder)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any(name.startswith("network.stitch") for name in moved)
    assert any(name.startswith("network.tail.layers") for name in moved)
    assert not any(name.startswith(("head.", "null.")) for name in moved)


def test_interrupted_finetuning_resumes_bit_for_bit(stitch, tmp_path, aesthetic_folder):
    straight = aesthetic_folder.parent
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/epoch-000002")
    shutil.rmtree(tmp_path / "run/value_model")
    folder = stitch("aesthetic", tmp_path / "run", *CUT)
    first, second = weights(folder), weights(aesthetic_folder)
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert rows(tmp_path / "run") == rows(straight)


def test_the_result_does_not_depend_on_the_micro_batch(stitch, tmp_path, aesthetic_folder):
    folder = stitch("aesthetic", tmp_path / "run", *CUT, "finetune.micro_batch=5")
    first, second = rows(tmp_path / "run"), rows(aesthetic_folder.parent)
    assert first[1]["train/loss"] == pytest.approx(second[1]["train/loss"], rel=1e-4)
    # Adam makes a full step of a gradient that is only rounding, so later figures are alike, not equal
    assert first[2]["train/loss"] == pytest.approx(second[2]["train/loss"], rel=0.03)
    assert weights(folder).keys() == weights(aesthetic_folder).keys()


@pytest.mark.slow
def test_the_start_depends_on_the_seed_and_on_nothing_drawn_before(stitch, tmp_path, aesthetic_folder):
    torch.manual_seed(99)
    same, again = weights(stitch("aesthetic", tmp_path / "same", *CUT)), weights(aesthetic_folder)
    other = weights(stitch("aesthetic", tmp_path / "other", *CUT, "finetune.epochs=1", "seed=1"))
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not torch.equal(same["network.stitch.linear.weight"], other["network.stitch.linear.weight"])


def test_broken_and_empty_files_are_left_out_and_named(stitch, tmp_path, capsys):
    stitch("aesthetic", tmp_path / "run", *CUT, "search.probe=23", only_search=True)
    told = capsys.readouterr().out
    assert "2 broken or empty images are left out" in told and "torn.png" in told and "empty.png" in told


def test_too_few_good_images_are_an_error(stitch, tmp_path):
    with pytest.raises(InputError, match=r"72 of 74 images can be read \(.*\), 112 or more are needed"):
        stitch("aesthetic", tmp_path / "run", *CUT, "data.held_out=80", only_search=True)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("search.last_reward_block=9", "search.last_reward_block must be at most 8"),
        ("reward.block=12", "reward.block must be at most 8"),
        ("backbone.block=7", "backbone.block must be at most 6"),
        ("data.images=/nowhere", "image folder not found: /nowhere"),
        ("reward.model=/nowhere", "model folder not found: /nowhere"),
        ("reward.model=weights/hps.pt", "rewards.open_clip weights/hps.pt OUT --tokenizer"),
        ("reward.head=/nowhere", "aesthetic head not found: /nowhere"),
        ("model.path=/nowhere", "model folder not found: /nowhere"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_written(stitch, tmp_path, override, told):
    with pytest.raises(InputError, match=told):
        stitch("aesthetic", tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_the_search_alone_leaves_its_table_and_its_picture(stitch, tmp_path):
    folder = stitch("aesthetic", tmp_path / "run", only_search=True)
    table = json.loads((folder / "search.json").read_text())
    assert {(row["block"], row["reward_block"]) for row in table} == {(i, j) for i in range(7) for j in (1, 2)}
    assert (folder / "search.png").read_bytes()[:4] == b"\x89PNG" and not (folder / "value_model").exists()


@pytest.mark.slow
def test_a_head_that_sees_the_prompt_needs_it_to_score(stitch, tmp_path):
    folder = stitch("clip", tmp_path / "run", *CUT, "backbone.conditioning=prompt", "finetune.epochs=1")
    model = StitchedValueModel.from_pretrained(folder)
    with pytest.raises(InputError, match="needs the prompts' conditions"):
        model.score(torch.randn(1, 16, 8, 8), 0.5, ["a red circle on white"])
    conditions = model.null
    assert model.score(torch.randn(1, 16, 8, 8), 0.5, ["a red circle on white"], conditions).shape == (1,)
