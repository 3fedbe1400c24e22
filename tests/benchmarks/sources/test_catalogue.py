import gzip
import hashlib
import json
from pathlib import Path

import pytest
import yaml

from benchmarks.sources.catalogue import Source, find, load, parse

ENTRY = {"file": "a.zip", "urls": ["https://host/a.zip"], "page": "https://host", "licence": "MIT"}


@pytest.fixture
def paper(root):
    return load(root / "benchmarks" / "paper" / "sources.yaml")


def test_every_checkpoint_and_evaluator_of_the_paper_suite_has_a_source(paper):
    assert set(paper) == {
        "lsun-bedrooms-ldm4",
        "lsun-churches-ldm8",
        "celebahq-ldm4",
        "ffhq-ldm4",
        "imagenet-ldm4",
        "coco-sd-v1-4",
        "coco-sdxl",
        "clip-vocabulary",
        "clip-merges",
        "cifar10-ddim",
        "inception",
        "open-clip-vit-b-32",
        "open-clip-vit-g-14",
        "coco-captions",
        "adm-imagenet256",
        "adm-lsun-bedroom256",
    }
    for source in paper.values():
        assert source.licence and source.page.startswith("https://")


def test_the_inception_weights_are_those_of_torch_fidelity(paper):
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert paper["inception"].urls == (URL_INCEPTION_V3,)
    assert paper["inception"].sha256.startswith(URL_INCEPTION_V3.removesuffix(".pth").rsplit("-", 1)[1])


def test_the_tokenizer_is_that_of_open_clip(paper):
    """CLIP's vocabulary and merges follow from the list of merges that open_clip ships, byte for byte."""
    tokenizer = pytest.importorskip("open_clip.tokenizer")
    shipped = gzip.decompress(Path(tokenizer.default_bpe()).read_bytes()).decode()
    merges = shipped.split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(tokenizer.bytes_to_unicode().values())
    words = letters + [f"{letter}</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    numbers = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    for name, text in (
        ("clip-vocabulary", json.dumps(numbers, ensure_ascii=False)),
        ("clip-merges", "#version: 0.2\n" + "\n".join(merges) + "\n"),
    ):
        assert hashlib.sha256(text.encode()).hexdigest() == paper[name].sha256
        assert len(text.encode()) == paper[name].bytes


def test_hub_files_are_pinned_to_a_revision(paper):
    for name, source in paper.items():
        if "huggingface.co" in source.urls[0]:
            revision = source.urls[0].split("/resolve/")[1].split("/")[0]
            assert len(revision) == 40, name
            assert source.sha256 is not None, name


def test_an_unknown_source_names_the_nearest(paper):
    with pytest.raises(ValueError, match="unknown source 'ffhq-ldm8': did you mean 'ffhq-ldm4'"):
        find(paper, "ffhq-ldm8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha265": "0" * 64}, "unknown key in s.yaml: a 'sha265': did you mean 'sha256'"),
        ({"urls": "https://host/a.zip"}, "urls is 'https://host/a.zip': it must be a list"),
        ({"urls": []}, r"urls of a.zip is \[\]: give at least one"),
        ({"urls": ["ftp://host/a.zip"]}, "each http:// or https://"),
        ({"file": "../a.zip"}, "file is '../a.zip': it must be a plain file name"),
        ({"file": ".a"}, "file is '.a'"),
        ({"file": "a.part"}, "file is 'a.part'"),
        ({"sha256": "0" * 63}, "sha256 of a.zip is '0+': it must have 64 digits"),
        ({"sha256": "F" * 64}, "sha256 of a.zip is 'F+'"),
        ({"md5": "1"}, "md5 of a.zip is '1': it must have 32 digits"),
        ({"bytes": 0}, "bytes of a.zip is 0, but must be at least 1"),
        ({"bytes": "7"}, "bytes is '7': it must be a whole number"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        parse({"a": ENTRY | change}, "s.yaml")


def test_a_file_belongs_to_one_source():
    with pytest.raises(ValueError, match=r"s.yaml: a and b are both a.zip: rename one"):
        parse({"a": ENTRY, "b": ENTRY}, "s.yaml")
    with pytest.raises(ValueError, match="lacks licence"):
        parse({"a": {key: value for key, value in ENTRY.items() if key != "licence"}}, "s.yaml")
    with pytest.raises(ValueError, match="must be a mapping of names"):
        parse(None, "s.yaml")


def test_sources_are_read_from_yaml(tmp_path):
    path = tmp_path / "sources.yaml"
    path.write_text(yaml.safe_dump({"a": ENTRY | {"sha256": None}}), encoding="utf-8")
    assert load(path) == {"a": Source("a.zip", ("https://host/a.zip",), "https://host", "MIT")}
    path.write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match="sources.yaml is not valid YAML"):
        load(path)
    with pytest.raises(ValueError, match="there is no absent.yaml .*--suite paper"):
        load(Path("absent.yaml"))
