"""Every tensor of the published checkpoints is known, goes where it belongs, and fills diffusers' networks."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from benchmarks.sources import catalogue
from benchmarks.sources.originals.architectures import ARCHITECTURES
from benchmarks.sources.originals.expected import IGNORED, NETWORKS, expected
from benchmarks.sources.originals.keys import Source
from tests.benchmarks.sources.originals import facts

OPERATIONS = {"copy": 0, "squeeze(-1)": 1, "squeeze(-1).squeeze(-1)": 2}


@cache
def full(architecture):
    kind = ARCHITECTURES[architecture]
    return expected(kind, kind.full)


@pytest.mark.parametrize("model", facts.MODELS)
def test_all_tensors_of_the_published_checkpoint_are_expected_in_their_shape(model):
    known = facts.of(model)
    shapes = full(known["architecture"]).shapes
    published = {key: tuple(shape) for key, (shape, _) in known["keys"].items()}
    assert shapes == {key: published[key] for key in shapes}
    rest = published.keys() - shapes.keys()
    assert rest == known["other"].keys() | {key for key, value in known["to"].items() if value["op"] == "drop"}
    assert all(IGNORED.fullmatch(key) or not key.startswith(NETWORKS) for key in rest)
    assert {known["keys"][key][1] for key in shapes} == {"float32"}


@pytest.mark.parametrize("model", facts.MODELS)
def test_each_tensor_goes_where_the_facts_say(model):
    known, holds = facts.of(model), full(facts.of(model)["architecture"])
    read = {source.key: source for part in holds.parts.values() for source in part.sources}
    raw = known["ema_to_raw"]
    assert {source.key for source in holds.others} == set(raw.values())
    named = {raw.get(key, key): source for key, source in read.items()}
    assert named.keys() == {key for key, value in known["to"].items() if value["op"] != "drop"}
    for key, source in named.items():
        value = known["to"][key]
        assert list(source.to) == value["to"]
        if value["op"] == "qkv_split":
            assert source.heads == value["heads"]
        else:
            (shape,) = source.to.values()
            assert source.shape == shape + (1,) * OPERATIONS[value["op"]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sources_fill_each_network(architecture):
    for part in full(architecture).parts.values():
        given = {name: shape for source in part.sources for name, shape in source.to.items()}
        assert given == {name: tuple(tensor.shape) for name, tensor in part.network.state_dict().items()}
        assert sum(len(source.to) for source in part.sources) == len(given)


def test_the_tensors_of_the_xl_file_are_all_of_its_bytes(root):
    source = catalogue.load(root / "benchmarks/paper/sources.yaml")["coco-sdxl"]
    shapes = full("sdxl").shapes
    ignored = 77 + 1  # positions and the scale of logits
    header = 8 + 402_436
    assert len(shapes) == 2515 - 2
    assert source.bytes == header + 2 * (ignored + sum(math.prod(shape) for shape in shapes.values()))


@pytest.mark.parametrize("size", ["full", "tiny"])
@pytest.mark.parametrize("model", facts.MODELS)
def test_settings_are_the_published_ones(model, size):
    known = facts.of(model)
    kind = ARCHITECTURES[known["architecture"]]
    holds = full(known["architecture"]) if size == "full" else expected(kind, kind.tiny)
    for name, folder in (("unet", "unet"), ("first_stage", "vae"), ("first_stage", "vqvae"), ("text_encoder",) * 2):
        settings = known["settings"][size].get(name)
        if settings is None or folder not in holds.parts:
            continue
        network = holds.parts[folder].network
        assert settings.get("_class_name", "CLIPTextModel") == type(network).__name__
        config = network.config
        config = config.to_dict() if name == "text_encoder" else dict(config)
        for key, value in settings.items():
            if key not in ("_class_name", "scaling_factor"):
                assert config[key] == (tuple(value) if isinstance(config[key], tuple) else value), (folder, key)
        if name == "first_stage" and not kind.scale_in_file:
            assert config["scaling_factor"] == settings["scaling_factor"]


@pytest.mark.parametrize("model", facts.MODELS)
def test_the_sampler_is_the_published_one(model):
    known = facts.of(model)
    scheduler = ARCHITECTURES[known["architecture"]].scheduler
    defaults = {"trained_betas": None, "thresholding": False, "rescale_betas_zero_snr": False}
    assert known["settings"]["full"]["scheduler"].items() <= (defaults | scheduler).items()


def test_heads_that_follow_one_another_are_told_apart():
    heads, channels = 2, 6
    labels = [
        100 * head + 10 * part + row for head in range(heads) for part in range(3) for row in range(channels // heads)
    ]
    joint = torch.tensor(labels)[:, None, None].expand(-1, channels, 1).float()
    names = ("to_q.weight", "to_k.weight", "to_v.weight")
    source = Source("qkv.weight", tuple(joint.shape), dict.fromkeys(names, (channels, channels)), heads)
    parts = source.split(joint)
    assert [parts[name][:, 0].tolist() for name in names] == [
        [0, 1, 2, 100, 101, 102],
        [10, 11, 12, 110, 111, 112],
        [20, 21, 22, 120, 121, 122],
    ]
