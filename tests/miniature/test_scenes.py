"""The renderer, its captions and its own taste."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from miniature import scenes
from miniature.scenes import SHADES, SIZE, Facts, Scene, draw_scenes, read_caption, render, true_aesthetic

PROMPTS = Path(scenes.__file__).parent / "prompts"


def single(colour="red", kind="circle", background="white", centre=(32.0, 32.0), radius=14.0, vividness=0.8):
    facts = Facts(((colour, kind),), background)
    shade = sum(SHADES[background]) / 2
    return Scene(facts, f"a {colour} {kind} on {background}", shade, (centre,), (radius,), (vividness,))


def described(facts):
    """What a picture shows: shapes without a relation have no order."""
    return facts if facts.relation is not None else replace(facts, shapes=tuple(sorted(facts.shapes)))


def every_single():
    return [(c, k, b) for c in scenes.COLOURS for k in scenes.KINDS for b in scenes.SHADES]


def test_scenes_are_seeded():
    assert draw_scenes(30, seed=5) == draw_scenes(30, seed=5) != draw_scenes(30, seed=6)
    assert draw_scenes(30, seed=5)[:10] == draw_scenes(10, seed=5)


def test_pictures_are_seeded_and_in_range():
    images = render(draw_scenes(40, seed=5))
    assert images.shape == (40, 3, SIZE, SIZE) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, render(draw_scenes(40, seed=5)))


def test_a_picture_does_not_depend_on_its_company():
    drawn = draw_scenes(20, seed=7)
    together = render(drawn)
    assert all(torch.equal(render([scene])[0], image) for scene, image in zip(drawn, together, strict=True))


@pytest.mark.parametrize("held_out", [False, True])
def test_captions_read_back_to_the_facts(held_out):
    drawn = draw_scenes(1000, seed=8, held_out=held_out)
    assert {len(scene.radii) for scene in drawn} == {1, 2, 3}
    wrong = [scene.caption for scene in drawn if read_caption(scene.caption) != scene.facts]
    assert not wrong


@pytest.mark.parametrize("caption", ["", "a dog on white", "a red circle", "red on white", "a pink circle on white"])
def test_other_texts_are_no_captions(caption):
    assert read_caption(caption) is None


def test_held_out_and_training_facts_are_disjoint():
    training = {described(scene.facts) for scene in draw_scenes(3000, seed=9)}
    held_out = {described(scene.facts) for scene in draw_scenes(1000, seed=10, held_out=True)}
    assert training and held_out and not training & held_out


def test_about_a_tenth_of_all_facts_is_held_out():
    rng = np.random.default_rng(11)
    share = np.mean([scenes._draw_facts(rng, (0.45, 0.42, 0.13)).held_out for _ in range(3000)])
    assert 0.05 < share < 0.15


def test_distinct_captions_are_distinct_and_of_their_side():
    found = scenes.distinct_captions(150, seed=12, held_out=True)
    assert len(set(found)) == 150 and all(read_caption(caption).held_out for caption in found)


@pytest.mark.parametrize("name, held_out", [("train", False), ("held_out", True)])
def test_shipped_prompts_are_distinct_captions_of_their_side(name, held_out):
    captions = (PROMPTS / f"{name}.txt").read_text().splitlines()
    assert len(captions) >= 200 and len(set(captions)) == len(captions)
    assert all(read_caption(caption).held_out == held_out for caption in captions)


def test_shapes_keep_inside_the_picture_and_apart():
    for scene in draw_scenes(200, seed=13):
        for index, ((x, y), radius) in enumerate(zip(scene.centres, scene.radii, strict=True)):
            assert all(radius + 3 <= value <= SIZE - radius - 3 for value in (x, y))
            for (other_x, other_y), other in zip(scene.centres[:index], scene.radii[:index], strict=True):
                assert np.hypot(x - other_x, y - other_y) >= radius + other + 4 - 1e-9


def test_taste_is_between_one_and_ten():
    drawn = render(draw_scenes(200, seed=14))
    pictures = torch.cat([drawn, 1 - drawn, torch.rand(20, 3, SIZE, SIZE), drawn * 5 - 2])
    scores = true_aesthetic(pictures)
    assert scores.shape == (len(pictures),) and scores.dtype == torch.float32
    assert scores.isfinite().all() and scores.min() >= 1 and scores.max() <= 10
    assert true_aesthetic(drawn).min() > 1.5


def test_blank_pictures_score_near_one():
    colours = torch.tensor([[0.0, 0, 0], [0.5, 0.5, 0.5], [1, 1, 1], [0.9, 0.1, 0.1], [0.1, 0.3, 0.95]])
    blank = colours[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    assert true_aesthetic(blank).max() < 1.5


def test_strong_noise_scores_near_one():
    generator = torch.Generator().manual_seed(15)
    normal = 0.5 + 0.3 * torch.randn(20, 3, SIZE, SIZE, generator=generator)
    uniform = torch.rand(20, 3, SIZE, SIZE, generator=generator)
    assert true_aesthetic(torch.cat([normal.clamp(0, 1), uniform])).max() < 1.5


def test_more_vivid_scores_higher():
    levels = (0.45, 0.6, 0.8, 1.0)
    scores = torch.stack([true_aesthetic(render([single(*s, vividness=v) for s in every_single()])) for v in levels])
    assert (scores.diff(dim=0) > 0).all()


@pytest.mark.parametrize("centre", [(20.0, 20.0), (44.0, 32.0), (32.0, 18.0)])
def test_centred_scores_higher_than_off_centre(centre):
    middle = true_aesthetic(render([single(*s) for s in every_single()]))
    aside = true_aesthetic(render([single(*s, centre=centre) for s in every_single()]))
    assert (middle > aside).all()
