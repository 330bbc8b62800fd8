"""Reading prompts."""

import json

import pytest
from datasets import Dataset

from stitchvm_reward.errors import InputError
from stitchvm_reward.prompts import read_prompts

PROMPTS = ["a red circle", "A red circle", "eine grüne Fläche, ok"]


def write(folder, ending):
    path = folder / f"prompts.{ending}"
    table = Dataset.from_dict({"prompt": PROMPTS, "other": [1, 2, 3]})
    if ending == "txt":
        path.write_text("\n".join(PROMPTS) + "\n\n")
    elif ending == "jsonl":
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    elif ending == "json":
        path.write_text(json.dumps([{"prompt": prompt} for prompt in PROMPTS]))
    elif ending == "csv":
        table.to_csv(path)
    else:
        table.to_parquet(path)
    return path


@pytest.mark.parametrize("ending", ["txt", "json", "jsonl", "csv", "parquet"])
def test_every_format_gives_the_prompts_in_order_and_letter_for_letter(tmp_path, ending):
    assert read_prompts(str(write(tmp_path, ending)), "prompt", "train") == PROMPTS


def test_a_missing_column_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match=r"no column 'promt'.*did you mean 'prompt'"):
        read_prompts(str(write(tmp_path, "csv")), "promt", "train")


def test_an_unknown_ending_is_refused(tmp_path):
    path = tmp_path / "prompts.xls"
    path.write_text("x")
    with pytest.raises(InputError, match=r"prompts must be a \.txt, \.json, .* got .*prompts\.xls"):
        read_prompts(str(path), "prompt", "train")
