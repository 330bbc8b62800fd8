"""The workflow in its two forms: for ComfyUI's interface and for its API."""

import json
from pathlib import Path

import pytest

from nft.export.lora import LORA_NAME

FOLDER = Path("docs/comfyui")
# What ComfyUI's nodes call their widgets, in the order in which the interface keeps their values. The interface adds
# what becomes of a seed after a run, of which the API knows nothing.
WIDGETS = {
    "CheckpointLoaderSimple": ["ckpt_name"],
    "TripleCLIPLoader": ["clip_name1", "clip_name2", "clip_name3"],
    "LoraLoaderModelOnly": ["lora_name", "strength_model"],
    "ModelSamplingSD3": ["shift"],
    "CLIPTextEncode": ["text"],
    "EmptySD3LatentImage": ["width", "height", "batch_size"],
    "KSampler": ["seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
    "VAEDecode": [],
    "SaveImage": ["filename_prefix"],
}
INTERFACE_ONLY = "control_after_generate"


@pytest.fixture
def interface():
    return json.loads((FOLDER / "sd35_medium_lora.json").read_text())


@pytest.fixture
def api():
    return json.loads((FOLDER / "sd35_medium_lora_api.json").read_text())


def graph(interface):
    """The interface's form as {id: (type, title, inputs)}, as the API has it."""
    links = {link[0]: link for link in interface["links"]}
    found = {}
    for node in interface["nodes"]:
        values = dict(zip(WIDGETS[node["type"]], node["widgets_values"], strict=True))
        values.pop(INTERFACE_ONLY, None)
        for entry in node["inputs"]:
            _, source, slot, *_ = links[entry["link"]]
            values[entry["name"]] = [str(source), slot]
        found[str(node["id"])] = (node["type"], node["title"], values)
    return found


def test_both_forms_describe_the_same_graph(interface, api):
    assert graph(interface) == {
        key: (node["class_type"], node["_meta"]["title"], node["inputs"]) for key, node in api.items()
    }


def test_every_link_joins_what_fits_and_is_known_at_both_ends(interface):
    nodes = {node["id"]: node for node in interface["nodes"]}
    assert len(nodes) == len(interface["nodes"]) and interface["last_node_id"] == max(nodes)
    assert interface["last_link_id"] == max(link[0] for link in interface["links"])
    for number, source, slot, target, place, kind in interface["links"]:
        output, entry = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert output["type"] == entry["type"] == kind
        assert number in output["links"] and entry["link"] == number
    ends = [entry["link"] for node in nodes.values() for entry in node["inputs"]]
    assert sorted(ends) == sorted(link[0] for link in interface["links"]), "every input is joined, once"
    starts = [link for node in nodes.values() for output in node["outputs"] for link in output["links"]]
    assert sorted(starts) == sorted(ends)


def test_the_lora_is_the_file_that_export_writes_and_lies_between_the_checkpoint_and_the_sampler(api):
    by_type = {node["class_type"]: (key, node["inputs"]) for key, node in api.items()}
    checkpoint, lora, shift, sampler = (
        by_type[name] for name in ("CheckpointLoaderSimple", "LoraLoaderModelOnly", "ModelSamplingSD3", "KSampler")
    )
    assert lora[1] == {"lora_name": LORA_NAME, "strength_model": 1.0, "model": [checkpoint[0], 0]}
    assert shift[1] == {"shift": 3.0, "model": [lora[0], 0]} and sampler[1]["model"] == [shift[0], 0]


def test_it_samples_as_the_model_was_trained(api):
    by_type = {node["class_type"]: node["inputs"] for node in api.values()}
    size, sampler = by_type["EmptySD3LatentImage"], by_type["KSampler"]
    assert (size["width"], size["height"]) == (512, 512)
    assert (sampler["steps"], sampler["cfg"], sampler["sampler_name"]) == (40, 1.0, "euler")
    assert (sampler["scheduler"], sampler["denoise"]) == ("normal", 1.0)
