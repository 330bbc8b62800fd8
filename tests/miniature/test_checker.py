"""The exact checker says yes to what a caption states and no to everything else."""

from dataclasses import replace

import pytest
import torch

from miniature import measures
from miniature.checker import check_captions, read
from miniature.scenes import COLOURS, KINDS, SHADES, SIZE, draw_scenes, render


def other(word, words):
    words = list(words)
    return words[(words.index(word) + 1) % len(words)]


def with_shapes(scene, *shapes):
    return replace(scene, facts=replace(scene.facts, shapes=shapes))


def change_colour(scene):
    (colour, kind), *rest = scene.facts.shapes
    return with_shapes(scene, (other(colour, COLOURS), kind), *rest)


def change_kind(scene):
    (colour, kind), *rest = scene.facts.shapes
    return with_shapes(scene, (colour, other(kind, KINDS)), *rest)


def change_background(scene):
    background = other(scene.facts.background, SHADES)
    return replace(scene, shade=sum(SHADES[background]) / 2)


def drop_a_shape(scene):
    fewer = with_shapes(scene, *scene.facts.shapes[:-1])
    return replace(fewer, centres=scene.centres[:-1], radii=scene.radii[:-1], vividness=scene.vividness[:-1])


def reverse_the_relation(scene):
    return replace(scene, centres=scene.centres[::-1])


@pytest.fixture(scope="module")
def drawn():
    return draw_scenes(300, seed=21)


def answers(captioned, shown):
    return check_captions([scene.caption for scene in captioned], render(shown))


@pytest.mark.parametrize("held_out", [False, True])
def test_clean_pictures_are_right(held_out):
    scenes = draw_scenes(300, seed=22, held_out=held_out)
    strict, graded = answers(scenes, scenes)
    assert strict.dtype == graded.dtype == torch.float32
    assert strict.all() and (graded == 1).all()


@pytest.mark.parametrize("change", [change_colour, change_kind, change_background])
def test_a_picture_of_other_facts_is_wrong_though_partly_right(drawn, change):
    strict, graded = answers(drawn, [change(scene) for scene in drawn])
    assert not strict.any() and (graded < 1).all() and (graded > 0).all()


def test_a_missing_shape_is_wrong(drawn):
    several = [scene for scene in drawn if len(scene.radii) > 1]
    strict, graded = answers(several, [drop_a_shape(scene) for scene in several])
    assert len(several) > 100 and not strict.any() and (graded < 1).all()


def test_a_shape_too_many_is_wrong(drawn):
    several = [scene for scene in drawn if len(scene.radii) > 1 and len(set(scene.facts.shapes)) == len(scene.radii)]
    (colour, kind) = several[0].facts.shapes[0]
    captions = ["a {} {} on {}".format(*scene.facts.shapes[0], scene.facts.background) for scene in several]
    strict, graded = check_captions(captions, render(several))
    assert colour in captions[0] and kind in captions[0]
    assert not strict.any() and (graded < 1).all()


def test_a_reversed_relation_is_wrong(drawn):
    related = [scene for scene in drawn if scene.facts.relation is not None]
    strict, graded = answers(related, [reverse_the_relation(scene) for scene in related])
    assert len(related) > 50 and not strict.any() and (graded < 1).all()


def test_shapes_without_a_relation_may_stand_in_any_order(drawn):
    free = [scene for scene in drawn if len(scene.radii) == 2 and scene.facts.relation is None]
    swapped = [
        replace(with_shapes(scene, *scene.facts.shapes[::-1]), vividness=scene.vividness[::-1]) for scene in free
    ]
    assert free and answers(free, swapped)[0].all()


def test_the_share_is_one_exactly_where_all_is_right(drawn):
    generator = torch.Generator().manual_seed(23)
    clean = render(drawn)
    noise = torch.rand(clean.shape, generator=generator)
    blank = torch.full_like(clean, 0.5)
    for images in (clean, clean.roll(1, 0), 0.6 * clean + 0.4 * noise, noise, blank, 1 - clean):
        strict, graded = check_captions([scene.caption for scene in drawn], images)
        assert graded.min() >= 0 and graded.max() <= 1
        assert torch.equal(strict == 1, graded == 1) and set(strict.tolist()) <= {0.0, 1.0}
    assert not strict.any()


def test_what_was_read_is_what_was_drawn(drawn):
    for scene, reading in zip(drawn, read(render(drawn)), strict=True):
        assert reading.background == scene.facts.background
        assert sorted((blob.colour, blob.kind) for blob in reading.blobs) == sorted(scene.facts.shapes)
        centres = sorted((blob.x, blob.y) for blob in reading.blobs)
        assert centres == [pytest.approx(centre, abs=2.5) for centre in sorted(scene.centres)]


def test_a_coloured_background_is_none_of_the_worlds():
    tinted = torch.tensor([0.9, 0.4, 0.4]).view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE)
    assert read(tinted)[0].background is None


def test_a_text_that_is_no_caption_is_refused(drawn):
    with pytest.raises(ValueError, match="a dog"):
        check_captions(["a dog"], render(drawn[:1]))


def test_measures_give_one_score_an_image(drawn):
    images, captions = render(drawn[:8]), [scene.caption for scene in drawn[:8]]
    assert measures.checker(images, captions).tolist() == [1.0] * 8
    assert measures.checker_share(images, captions).tolist() == [1.0] * 8
    assert measures.true_aesthetic(images, captions).shape == (8,)
