"""The worked additions of CONTRIBUTING.md, taken from the page and followed on a tiny suite."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from benchmarks.datasets import dataset
from benchmarks.metrics import metrics
from benchmarks.runtime import excerpt
from benchmarks.suite import discover
from benchmarks.suite.record import Cell, Record
from tests.benchmarks.tiny_suite import PARAMS, generate, prepared, run, score, suite
from tests.tfmq import networks
from tfmq.plan import quantized_layers

__all__ = ["generate", "prepared", "run", "score", "suite"]

TITLES = ("Add a method", "Add a metric", "Add a data set", "Add a model family")
# A file of the page: its path stands alone in the line above.
FILE = re.compile(r"^`([\w./]+)`:\n\n```(?:python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The sizes of a task that are those of the tiny suite here.
SIZES = ("steps", "eta", "images", "batch", "calibration_images", "reference_images")
SIDE = 8

Add = Callable[[str], None]


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    """The text of each section, by title."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = (section.partition("\n") for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:])
    return {title: text for title, _, text in found}


@pytest.fixture
def add(sections: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Add the files of a section, outside the tree, and its lines to the params.yaml of the current folder."""
    modules: list[str] = []

    def added(title: str) -> None:
        for path, text in FILE.findall(sections[title]):
            if path == "params.yaml":
                settings = Path("params.yaml")
                document = merged(yaml.safe_load(settings.read_text()), yaml.safe_load(text))
                settings.write_text(yaml.safe_dump(document, sort_keys=False))
                continue
            package = importlib.import_module(Path(path).parent.as_posix().replace("/", "."))
            folder = tmp_path / "added" / Path(path).parent
            folder.mkdir(parents=True)
            (folder / Path(path).name).write_text(text)
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
            modules.append(f"{package.__name__}.{Path(path).stem}")

    yield added
    for module in modules:
        package, _, name = module.rpartition(".")
        sys.modules.pop(module, None)
        vars(sys.modules[package]).pop(name, None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the tiny suite's settings, and none of its files."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS, sort_keys=False))
    return tmp_path


def merged(document: dict, lines: dict) -> dict:
    """Settings with some lines added: mappings grow, lists grow, all else is replaced."""
    found = dict(document)
    for key, value in lines.items():
        if isinstance(value, dict):
            found[key] = merged(found.get(key, {}), value)
        else:
            found[key] = found.get(key, []) + value if isinstance(value, list) else value
    return found


def test_every_addition_of_the_page_is_followed_here(sections):
    assert tuple(title for title in sections if title.startswith("Add ")) == TITLES
    paths = [path for title in TITLES for path, _ in FILE.findall(sections[title])]
    assert len(paths) == len(re.findall("^```(?:python|yaml)$", "".join(sections.values()), re.MULTILINE)) == 6
    assert not [path for path in paths if path != "params.yaml" and Path(path).exists()]


def test_a_method_with_a_pass_of_its_own(suite, add, sections, run, generate, score):
    (row,) = re.findall(r"^dvc repro (score_\S+)$", sections["Add a method"], re.MULTILINE)
    assert row == "score_variants@emoji-ldm4-clipped"
    add("Add a method")
    assert generate("clipped", table="variants") == (0, [])
    record = score("clipped", table="variants")["w4a8"]
    assert record.status == "measured"
    assert record.settings["method"] == {"deviations": 2.5, "steps": 20, "images": 64}
    names = ["clip weights", "weight ranges", "round to nearest", "activation ranges"]
    assert list(record.cost.seconds) == ["calibrate", *names, "sample"]
    assert run("tables") == (0, [])
    cells = pd.read_csv("results/cells.csv").set_index("method")
    assert cells.loc["clipped", "table"] == "variants" and cells.loc["clipped", "psnr"] > 0
    variants = Path("results/README.md").read_text().split("## Variants")[1].split("\n## ")[0]
    assert "Clipped weights" in variants
    assert "after outliers of each output channel are cut off" in Path("results/METHODS.md").read_text()


@pytest.mark.parametrize("precision", ["w4a8", "w4a32"])
def test_the_pass_of_that_method_clips_what_is_quantised(folder, add, precision):
    add("Add a method")
    recipe = discover.method("clipped").config(deviations=1.0, images=2).recipe()
    unet, full, _, report = networks.quantized(recipe, precision)
    for path, layer in quantized_layers(unet).items():
        weight = full.get_submodule(path).weight.flatten(1)
        mean, reach = weight.mean(1, keepdim=True), weight.std(1, correction=0, keepdim=True)
        step = layer.weight_scale.amax(1, keepdim=True)
        assert ((layer.weight.flatten(1) - mean).abs() <= reach + step).all(), path
    assert report.cost.optimizer_steps == 0
    with pytest.raises(ValueError, match="deviations is 0: it must be a finite number above 0"):
        discover.method("clipped").config(deviations=0).recipe()


def test_a_metric(suite, add, run, generate, score):
    add("Add a metric")
    assert list(metrics()).index("last_noise_error") == list(metrics()).index("noise_error") + 1
    assert "last_noise_error" not in score("full_precision")["w32a32"].metrics
    assert generate("nearest", "w4a8") == (0, [])
    value = score("nearest", "w4a8")["w4a8"].metrics["last_noise_error"]
    errors = load_file("work/cells/toy/nearest/w4a8/errors.safetensors")["trajectory"]
    assert value.value == pytest.approx(errors[:, -1].double().mean().item()) and value.low < value.high
    assert excerpt.read(Cell("toy", "nearest", "w4a8")).values["last_noise_error"].shape == (len(errors),)
    assert run("tables") == (0, [])
    assert "Noise error, last step" in Path("results/README.md").read_text()
    cells = pd.read_csv("results/cells.csv").set_index(["method", "precision", "table"])
    assert cells.loc[("nearest", "w4a8", "leaderboard"), "last_noise_error"] == pytest.approx(value.value, rel=1e-3)


def test_a_data_set(folder, add):
    add("Add a data set")
    assert "png_folder" in discover.names(discover.DATASETS)
    pixels = write_images(Path("pictures"), 5)
    images = dataset("png_folder").images(Path("pictures"), SIDE)
    assert torch.equal(torch.cat(list(images.batches(2))), pixels) and len(images) == 5
    with pytest.raises(ValueError, match="make it 16 pixels a side"):
        dataset("png_folder").images(Path("pictures"), 16).read(0)
    with pytest.raises(ValueError, match="nowhere holds no PNG image"):
        dataset("png_folder").images(Path("nowhere"), SIDE)
    assert "Where:" in discover.text(discover.DATASETS, "png_folder")


def test_a_model_family_and_its_task(suite, add, run):
    add("Add a data set")
    add("Add a model family")
    settings = Path("params.yaml")
    document = yaml.safe_load(settings.read_text())
    task = document["tasks"]["digits"]
    assert set(task) == set(PARAMS["tasks"]["toy"])
    task |= {name: PARAMS["tasks"]["toy"][name] for name in SIZES} | {"resolution": SIDE}
    settings.write_text(yaml.safe_dump(document, sort_keys=False))
    discover.family("grey").save_tiny(Path(task["checkpoint"]), 0)
    write_images(Path(task["data"]), 5)
    for stage in ("calibrate", "reference"):
        assert run(stage, "--task", "digits") == (0, [])
    for row in (("full_precision",), ("nearest", "--table", "leaderboard", "--precision", "w4a8")):
        for stage in ("generate", "score"):
            assert run(stage, "--task", "digits", "--shards", "1", "--method", *row) == (0, [])
    for cell in ("full_precision/w32a32", "nearest/w4a8"):
        record = Record.from_json(Path(f"results/records/digits/{cell}.json").read_text())
        assert record.status == "measured" and record.metrics["fd_data"].n == task["images"]
        assert "png-folder@1" in str(record.settings["reference"])
    assert run("tables") == (0, [])
    cells = pd.read_csv("results/cells.csv")
    assert cells.loc[(cells["task"] == "digits") & cells["fd_data"].notna(), "method"].tolist() == [
        "full_precision",
        "nearest",
    ]


def write_images(folder: Path, count: int) -> torch.Tensor:
    """Write random PNG images; returns them as uint8 (N, 3, side, side)."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    for index, image in enumerate(pixels):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(folder / f"{index:05d}.png")
    return pixels
