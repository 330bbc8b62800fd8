"""What the reward models are trained on: altered scenes, malformed shapes, and what a right picture may look like."""

import numpy as np
import torch

from miniature import checker, clip, reward, scenes

DRAWN = scenes.draw_scenes(60, 5)


def strict(captions, images):
    return checker.check_captions(captions, images)[0]


def test_an_altered_scene_states_one_other_fact_and_stays_where_it_was():
    altered = [scenes.alter(scene, np.random.default_rng(n)) for n, scene in enumerate(DRAWN)]
    for scene, other in zip(DRAWN, altered):
        assert other.facts.statement != scene.facts.statement
        assert scenes.read_caption(other.caption).statement == other.facts.statement
        assert set(other.centres) <= set(scene.centres) and len(other.radii) in (len(scene.radii), len(scene.radii) - 1)
    images = scenes.render(altered)
    assert strict([scene.caption for scene in altered], images).mean() == 1
    assert strict([scene.caption for scene in DRAWN], images).sum() == 0
    assert {len(other.radii) < len(scene.radii) for scene, other in zip(DRAWN, altered)} == {True, False}


def test_altered_scenes_can_be_kept_on_one_side_of_the_split():
    for n, scene in enumerate(DRAWN):
        assert not scenes.alter(scene, np.random.default_rng(n), held_out=False).facts.held_out


def test_statements_that_say_the_same_are_the_same():
    red, blue = ("red", "circle"), ("blue", "square")
    above = scenes.Facts((red, blue), "white", "above")
    assert above.statement == scenes.Facts((blue, red), "white", "below").statement
    assert above.statement != scenes.Facts((blue, red), "white", "above").statement
    assert scenes.Facts((red, blue), "white").statement == scenes.Facts((blue, red), "white").statement


def test_softened_pictures_are_still_right_and_malformed_ones_mostly_are_not():
    captions, random = [scene.caption for scene in DRAWN], torch.Generator().manual_seed(0)
    assert strict(captions, reward.soften(scenes.render(DRAWN), random)).mean() > 0.95
    wrong = reward.malform(DRAWN, np.random.default_rng(0), random)
    assert wrong.min() >= 0 and wrong.max() <= 1 and strict(captions, wrong).mean() < 0.3


def test_a_malformed_picture_is_wrong_for_every_text_and_an_equal_statement_is_not():
    pictures = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts, scale = pictures[:3].clone(), torch.tensor(2.0)
    different, alike = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 2])
    plain = clip.contrast(pictures[:3], texts, different, scale)
    assert clip.contrast(torch.cat([pictures[:3], texts[:1]]), texts, different, scale) > plain
    assert clip.contrast(pictures[:3], texts, alike, scale) < plain
