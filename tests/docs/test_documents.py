"""Every command, recipe, import, name and link of the documents is checked; see tests/docs/checker.py."""

from pathlib import Path

import pytest

from tests.docs.checker import (
    ROOT,
    Block,
    WrongDocument,
    blocks,
    check_command,
    check_name,
    check_python,
    check_yaml,
    commands,
    mistakes,
)

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "miniature/README.md")),
    *sorted(ROOT.joinpath("docs").rglob("*.md")),
]
MOST_BYTES = 8192


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_says_what_is_so(path):
    wrong = mistakes(path)
    assert not wrong, "\n".join(["", *wrong])


def test_the_measurements_say_what_is_so():
    wrong = mistakes(ROOT / "BENCHMARKS.md", labelled=False)
    assert not wrong, "\n".join(["", *wrong])


def test_the_readme_is_short_and_lists_every_document():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= MOST_BYTES, f"README.md has {len(text.encode())} bytes, at most {MOST_BYTES}"
    for path in ROOT.joinpath("docs").glob("*.md"):
        assert f"(docs/{path.name})" in text, f"README.md does not link to docs/{path.name}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("accelerate launch launch/nft.py recipes/shapes/aesthetic.yaml --fast", "unrecognized arguments: --fast"),
        ("accelerate launch launch/nft.py recipes/shapes/aesthetic.yaml train.rate=1", "unknown recipe key train.rate"),
        ("torchrun --nproc-per-node 2 launch/nft.py recipes/no_such.yaml", "recipes/no_such.yaml does not exist"),
        ("accelerate launch --config_file launch/accelerate/no.yaml launch/nft.py RECIPE", "no.yaml does not exist"),
        ("python launch/train.py recipes/shapes/aesthetic.yaml", "launch/train.py does not exist"),
        ("python launch/stitch.py recipes/shapes/aesthetic.yaml", "unknown recipe key"),
        ("python launch/evaluate.py pictures RECIPE", "invalid choice"),
        (
            "python launch/sample.py MODEL --prompts A --grid A.png --steer best --steering recipes/steer/shapes.yaml",
            "method",
        ),
        ("python -m nft.no_such_module runs/a", "nft.no_such_module does not exist"),
        ("python -m miniature.images --pictures 3", "unrecognized arguments"),
        ("sbatch --nodes=2 launch/slurm/nft.sbatch recipes/aesthetic.yaml epoch=3", "unknown recipe key epoch"),
        ('seeds=$(sbatch --parsable --wrap "python launch/stitch.py recipes/stitch/none.yaml")', "does not exist"),
        ("make coffee", "make has no target coffee"),
        ("for s in 1 2; do\n  python launch/nft.py RECIPE sed=$s\ndone", "unknown recipe key sed"),
        ("curl something", "curl is not a command"),
    ],
)
def test_a_wrong_command_is_found(line, message):
    with pytest.raises(WrongDocument) as error:
        for command in commands(line):
            check_command(command)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("from nft.config import load_recipes", "nft.config.load_recipes does not exist"),
        ("import nft.configuration", "nft.configuration does not exist"),
        ("def f(:", "is not Python"),
    ],
)
def test_wrong_python_is_found(code, message):
    with pytest.raises(WrongDocument, match=message):
        check_python(code)


def test_a_wrong_recipe_is_found():
    base = "recipes/shapes/aesthetic.yaml"
    check_yaml(Block(1, "yaml", "train:\n  beta: 0.5", base))
    with pytest.raises(WrongDocument, match=r"unknown recipe key train\.betas"):
        check_yaml(Block(1, "yaml", "train:\n  betas: 0.5", base))
    with pytest.raises(WrongDocument, match="names its base"):
        check_yaml(Block(1, "yaml", "epochs: 3", None))


@pytest.mark.parametrize("name", ["train.no_such_key", "nft.trainer.Train", "recipes/none.yaml", "nft/test_none.py"])
def test_a_wrong_name_is_found(name):
    with pytest.raises(WrongDocument):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["train.beta_kl: 0.1", "nft.trainer.Trainer.train", "recipes/stitch", "epochs", "--lora"]
)
def test_right_names_pass(name):
    check_name(name)


def test_links_and_blocks_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.docs.checker.ROOT", tmp_path)
    path = Path(tmp_path) / "a.md"
    path.write_text("# One heading\n[a](#one-heading) [b](#another) [c](none.md)\n```\nls\n```\n")
    assert [mistake.partition(": ")[2] for mistake in mistakes(path)] == [
        "a block of language ''",
        "the link #another names a heading that does not exist",
        "the link none.md leads nowhere",
    ]
    with pytest.raises(WrongDocument, match="not closed"):
        blocks("```sh\nls")
