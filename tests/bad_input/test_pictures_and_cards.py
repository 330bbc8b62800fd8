"""Pictures of another format than allowed are not opened; texts in a model card are shown, not interpreted."""

import io
import shutil

import pytest
from PIL import EpsImagePlugin, Image

from nft.export.card import escaped
from stitchvm_reward.stitching.images import find_images


def test_postscript_called_png_does_not_start_ghostscript(tmp_path, monkeypatch):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "EPS")
    (tmp_path / "a.png").write_bytes(picture.getvalue())
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    assert find_images(str(tmp_path), "", "", "", 0).load(0, 8) is None


@pytest.mark.parametrize(("kind", "read"), [("BMP", False), ("TIFF", False), ("PNG", True), ("WEBP", True)])
def test_a_picture_is_of_an_allowed_format_whatever_its_name(tmp_path, kind, read):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", kind)
    assert (find_images(str(tmp_path), "", "", "", 0).load(0, 8) is not None) == read


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("true_aesthetic + FK-V (2.5)", "true_aesthetic + FK-V (2.5)"),
        ("<script>a && b</script>", "&lt;script&gt;a &amp;&amp; b&lt;/script&gt;"),
        ("![x](http://a.b)", r"\!\[x\](http\://a.b)"),
        ("a\n\n# b\r\n---", r"a \# b ---"),
        ("*a* _b_ `c` |d| ~e~", r"\*a\* \_b\_ \`c\` \|d\| \~e\~"),
        ("a\\*b", r"a\\\*b"),
    ],
)
def test_markup_is_shown_as_it_was_written(text, shown):
    assert escaped(text) == shown


def test_a_card_shows_title_author_and_recipe_as_they_are(launched, trained_run, tmp_path):
    run = shutil.copytree(trained_run[1], tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("split: train", 'split: "```` <b>"'))
    texts = ("--title", "<img src=x>\n# *Vivid*", "--author", "[me](javascript:x) <b>")
    code, _, error = launched("export", run, "--out", tmp_path / "out", *texts)
    assert code == 0, error
    body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)[2]
    prose, _, fenced = body.partition("\n`````yaml\n")
    assert "\n# &lt;img src=x&gt; \\# \\*Vivid\\*\n" in prose and "<" not in prose
    assert "\n- author: \\[me\\](javascript\\:x) &lt;b&gt;\n" in prose
    assert "split: '```` <b>'" in fenced and fenced.endswith("\n`````\n")
