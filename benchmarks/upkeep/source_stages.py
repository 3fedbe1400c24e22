"""The stages of the paper suite that come before its tasks: downloads, prompts, evaluators, converted checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.sources.catalogue import Source
from benchmarks.stages import weights
from benchmarks.upkeep.stage import OF_TASKS, STAGES, Stage, code_of


def source_stages(sources: Mapping[str, Source]) -> list[Stage]:
    """Downloads and what is made of them, which is never in DVC's cache: a second copy of hundreds of GiB."""
    downloads = {name: source.file for name, source in sources.items()}
    made = {
        name: {"file": downloads[name], "folder": weights.folder_of(name).relative_to(weights.DATA).as_posix()}
        for name in (weights.INCEPTION, *weights.CLIPS)
    }
    return [
        Stage(
            "fetch",
            "Downloads persist: where only addresses change, nothing is downloaded again; sources.yaml or"
            " fetched.json have their hashes.",
            "python -m benchmarks fetch --source ${key}",
            params=[{"sources.yaml": ["${key}"]}],
            outs={"downloads/${item}": "{cache: false, persist: true}"},
            over=("foreach", downloads),
        ),
        Stage(
            "prompts",
            "",
            "python -m benchmarks prompts",
            deps=[
                f"downloads/{downloads['coco-captions']}",
                "prompts/coco/calibration.ids",
                "prompts/coco/evaluation.ids",
            ],
            code=code_of(STAGES / "prompts.py"),
            outs={f"prompts/coco/{purpose}.txt": "{cache: false}" for purpose in ("calibration", "evaluation")},
        ),
        Stage(
            "weights",
            "Evaluators: the downloaded file and the folder that is made of it.",
            "python -m benchmarks weights --source ${key}",
            deps=["downloads/${item.file}"],
            code=code_of(STAGES / "weights.py"),
            outs={"data/${item.folder}": "{cache: false}"},
            over=("foreach", made),
        ),
        Stage(
            "convert",
            "",
            "python -m benchmarks convert --task ${key}",
            deps=["${item.original}", "${item.vocabulary}", "${item.merges}"],
            code=code_of(STAGES / "convert.py"),
            outs={"data/${key}": "{cache: false}"},
            over=OF_TASKS,
        ),
    ]
