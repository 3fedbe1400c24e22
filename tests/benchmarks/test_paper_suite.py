"""The paper suite from its downloads to its tables: tiny originals come from a server on this machine.

Nothing but sizes and addresses differs from the real run: the suite's own folder, sources, parameters, prompts and
command line.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from safetensors.torch import save_file

from benchmarks import __main__ as command_line
from benchmarks import captions, smoke, sources
from benchmarks.datasets import cifar10
from benchmarks.originals.architectures import TASKS
from benchmarks.record import Record
from tests.benchmarks.datasets.originals import WRITERS
from tests.benchmarks.inception import write_weights
from tests.benchmarks.loopback import Loopback
from tests.benchmarks.originals.tiny import write_original, write_tokenizer
from tests.benchmarks.test_captions import annotations

# Of the images of the tiny originals.
SIDE, CIFAR_SIDE = 32, 16
PAPER = Path(command_line.__file__).parent / "paper"
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
# Published features are a data set's; here they are a normal distribution's.
ADM = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files of sources.yaml, as small as they can be."""
    folder = tmp_path_factory.mktemp("originals")
    files = {name: folder / source.file for name, source in sources.load(PAPER / "sources.yaml").items()}
    for task, architecture in TASKS.items():
        write_original(architecture, files[task])
    write_tokenizer(files["clip-vocabulary"], files["clip-merges"])
    write_weights(files["inception"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = open_clip.CLIP(**CLIP).state_dict()
    save_file(weights, files["open-clip-vit-b-32"])
    torch.save(weights, files["open-clip-vit-g-14"])
    with zipfile.ZipFile(files["coco-captions"], "w") as archive:
        for purpose, member in captions.MEMBERS.items():
            ids = (PAPER / "prompts" / "coco" / f"{purpose}.ids").read_text().split()
            archive.writestr(f"annotations/{member}", json.dumps(annotations(map(int, ids))))
    for name in ("adm-imagenet256", "adm-lsun-bedroom256"):
        np.savez(files[name], **ADM)
    return folder


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, originals: Path) -> Path:
    """The suite's folder with few images and steps, sources of this machine, and a few images of each data set."""
    folder = tmp_path_factory.mktemp("suites") / "paper"
    shutil.copytree(PAPER, folder, ignore=shutil.ignore_patterns("data", "downloads", "images", "work", ".resume"))
    settings = smoke.cut(yaml.safe_load((PAPER / "params.yaml").read_text(encoding="utf-8")))
    settings["tables"] = {"published": settings["tables"]["published"] | {"methods": ["tfmq"]}}
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
    return folder


@pytest.fixture
def run(suite: Path, originals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a stage in the suite's folder; its files come from a server that breaks off the first answer."""
    monkeypatch.chdir(suite)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(cifar10, "RECORDS", 1)
    monkeypatch.setattr(cifar10, "SIDE", CIFAR_SIDE)
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: CLIP)
    with Loopback(originals) as server:
        document = yaml.safe_load((PAPER / "sources.yaml").read_text(encoding="utf-8"))
        for source in document.values():
            source |= {"urls": [server.url(source["file"])], "sha256": None, "md5": None, "bytes": None}
        Path("sources.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        server.drops = [1000]

        def stage(*arguments: str) -> str:
            code = command_line.main(list(arguments))
            printed = capsys.readouterr()
            assert code == 0, printed.err
            return printed.out

        yield stage


@pytest.mark.parametrize("task", TASKS)
def test_a_task_runs_from_its_download_to_its_table(suite, run, task):
    settings = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["tasks"][task]
    wanted = {"inception", task}
    if "statistics" in settings:
        wanted |= {
            name for name, source in sources.load(Path("sources.yaml")).items() if source.file in settings["statistics"]
        }
    if "clip" in settings:
        wanted |= {"clip-vocabulary", "clip-merges", "coco-captions", "open-clip-vit-b-32", "open-clip-vit-g-14"}
    for name in sorted(wanted):
        run("fetch", "--source", name)
        if name == "inception" or name.startswith("open-clip"):
            run("weights", "--source", name)
        if name == "coco-captions":
            run("prompts")
    run("convert", "--task", task)
    run("calibrate", "--task", task, "--shards", "1")
    run("reference", "--task", task, "--shards", "1")
    rows = [("full_precision", []), ("tfmq", ["--table", "published"])]
    for method, table in rows:
        for stage in ("generate", "score"):
            run(stage, "--task", task, "--method", method, *table, "--shards", "1")
    shown = run("tables")
    assert f"### {task}" in shown
    record = Record.from_json(Path(f"results/records/{task}/tfmq-published/w4a8.json").read_text(encoding="utf-8"))
    assert record.status == "measured"
    names = {"fd_data", "sfd_data", "is_score", "psnr", "temporal_error"}
    names |= {"clip_score", "clip_score_second"} if "clip" in settings else set()
    names |= {"fd_clean"} if "second_evaluator" in settings and "data" in settings else set()
    assert names <= set(record.metrics)
    assert record.settings["clip"] == [] or [name.split()[1] for name in record.settings["clip"]] == [
        "openai",
        "laion2b_s12b_b42k",
    ]
