"""convert: a task's original checkpoint becomes a folder of diffusers, which `benchmarks/models` loads."""

from __future__ import annotations

from pathlib import Path

from benchmarks.runtime import files, manifest
from benchmarks.sources import disk
from benchmarks.sources.archive import Mismatch, extract_member
from benchmarks.sources.originals.architectures import ARCHITECTURES, TASKS
from benchmarks.sources.originals.convert import convert, write_tokenizer
from benchmarks.stages import _setup
from benchmarks.stages.fetch import checked, unfit
from benchmarks.suite import discover
from benchmarks.suite.params import Suite

# Sources of the tokenizer, which a text-to-image checkpoint is without.
TOKENIZER = ("clip-vocabulary", "clip-merges")


def run(suite: Suite, task_name: str) -> None:
    """Write the folder ``checkpoint`` of a task from the file that its source of the same name fetched.

    The folder takes its name when all is written and listed in its manifest. Raises ValueError for a task without an
    original, and in one line for a file that is missing, damaged or of another model.
    """
    task = _setup.task_of(suite, task_name)
    if task.name not in TASKS:
        raise discover.unknown("original of task", task.name, TASKS, "Only their checkpoints are converted.")
    architecture = ARCHITECTURES[TASKS[task.name]]
    if task.family != architecture.family:
        raise ValueError(f"task {task.name} has family {task.family}, but its original is one of {architecture.family}")
    checkpoint, source = checked(task.name)
    tokenizer = [checked(name)[0] for name in TOKENIZER] if architecture.full.text_encoder is not None else []
    disk.sweep(Path(task.checkpoint))
    with files.new_folder(Path(task.checkpoint)) as folder:
        unpacked = folder / "original.ckpt"
        try:
            if source.member is not None:
                extract_member(checkpoint, source.member, unpacked)
            convert(architecture, checkpoint if source.member is None else unpacked, folder)
        except Mismatch as reason:
            raise unfit(task.name, checkpoint, reason) from None
        unpacked.unlink(missing_ok=True)
        if tokenizer:
            write_tokenizer(*tokenizer, folder)
        manifest.write(folder)
    print(f"{task.name}: {task.checkpoint}, the {architecture.title} of {checkpoint}")
