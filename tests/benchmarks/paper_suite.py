"""The paper suite cut down to seconds: tiny originals in the published formats, few images and steps, one row a table.

Nothing but sizes and addresses differs from the real suite: these are its own folder, sources, parameters and prompts.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import open_clip
import torch
import yaml
from safetensors.torch import save_file

import benchmarks
from benchmarks.sources import catalogue, coco_captions
from benchmarks.sources.originals.architectures import TASKS
from benchmarks.upkeep import smoke
from tests.benchmarks.datasets.originals import WRITERS
from tests.benchmarks.inception import write_weights
from tests.benchmarks.loopback import Loopback
from tests.benchmarks.sources.originals.tiny import write_original, write_tokenizer
from tests.benchmarks.sources.test_coco_captions import annotations

PAPER = Path(benchmarks.__file__).parent / "paper"
# What is made or brought, and so no part of the suite.
MADE = ("data", "downloads", "fetched.json", "images", "results", "work", ".resume", "__pycache__")
# Of the images of the tiny originals.
SIDE, CIFAR_SIDE = 32, 16
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
# Published features are a data set's; here they are a normal distribution's.
ADM = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}


def write_originals(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the files of sources of these names (all, unless told otherwise), as small as they can be."""
    known = catalogue.load(PAPER / "sources.yaml")
    for name in known if names is None else names:
        _write_original(name, folder / known[name].file)


def _write_original(name: str, path: Path) -> None:
    if name in TASKS:
        write_original(TASKS[name], path)
    elif name == "inception":
        write_weights(path)
    elif name.startswith("adm-"):
        np.savez(path, **ADM)
    elif name.startswith("open-clip-"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = open_clip.CLIP(**CLIP).state_dict()
        (save_file if path.suffix == ".safetensors" else torch.save)(weights, path)
    elif name == "coco-captions":
        with zipfile.ZipFile(path, "w") as archive:
            for purpose, member in coco_captions.MEMBERS.items():
                ids = (PAPER / "prompts" / "coco" / f"{purpose}.ids").read_text().split()
                archive.writestr(f"annotations/{member}", json.dumps(annotations(map(int, ids))))
    elif name == "clip-vocabulary":
        write_tokenizer(path, path.with_name("clip-merges.txt"))


def write_suite(folder: Path) -> None:
    """Write the suite's folder with few images and steps, one row a table, and a few images of each data set."""
    shutil.copytree(PAPER, folder, ignore=shutil.ignore_patterns(*MADE))
    settings = smoke.cut(yaml.safe_load((PAPER / "params.yaml").read_text(encoding="utf-8")))
    for table in settings["tables"].values():
        table |= {"methods": [name for name in table["methods"] if name == "tfmq"] or table["methods"][:1]}
    for task in settings["tasks"].values():
        side = CIFAR_SIDE if task["family"] == "ddpm" else SIDE
        task |= {"images": 4, "batch": 2, "data_images": None, "resolution": side}
        if "data" in task:
            WRITERS[task["dataset"]](folder / task["data"])
    for path in (folder / "images" / "cifar10").iterdir():
        path.write_bytes(path.read_bytes()[: 1 + 3 * CIFAR_SIDE**2])
    for name in ("calibration", "evaluation"):  # the tiny checkpoint has ten classes
        (folder / "prompts" / "imagenet" / f"{name}.txt").write_text("\n".join("0123456789") + "\n")
    (folder / "params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def write_sources(folder: Path, server: Loopback) -> None:
    """Let a suite's files come from ``server``, whatever their hashes are."""
    document = yaml.safe_load((PAPER / "sources.yaml").read_text(encoding="utf-8"))
    for source in document.values():
        source |= {"urls": [server.url(source["file"])], "sha256": None, "md5": None, "bytes": None}
    (folder / "sources.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
