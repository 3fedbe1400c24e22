"""convert: a task's original checkpoint becomes a folder of diffusers, which `benchmarks/models` loads."""

from __future__ import annotations

from pathlib import Path

from benchmarks import discover, manifest, sources
from benchmarks.archive import extract_member
from benchmarks.originals.architectures import ARCHITECTURES, TASKS
from benchmarks.originals.convert import convert, write_tokenizer
from benchmarks.params import Suite
from benchmarks.stages import files, setup
from benchmarks.stages.fetch import DOWNLOADS, SOURCES

# Sources of the tokenizer, which a text-to-image checkpoint is without.
TOKENIZER = ("clip-vocabulary", "clip-merges")


def run(suite: Suite, task_name: str) -> None:
    """Write the folder ``checkpoint`` of a task from the file that its source of the same name fetched.

    The folder takes its name when all is written and listed in its manifest. Raises ValueError for a task without an
    original, and in one line for a file that is missing, damaged or of another model.
    """
    task = setup.task_of(suite, task_name)
    if task.name not in TASKS:
        raise discover.unknown("original of task", task.name, TASKS, "Only their checkpoints are converted.")
    architecture = ARCHITECTURES[TASKS[task.name]]
    if task.family != architecture.family:
        raise ValueError(f"task {task.name} has family {task.family}, but its original is one of {architecture.family}")
    checkpoint, member = _fetched(task.name)
    with files.new_folder(Path(task.checkpoint)) as folder:
        if member is not None:
            unpacked = folder / "original.ckpt"
            extract_member(checkpoint, member, unpacked)
            convert(architecture, unpacked, folder)
            unpacked.unlink()
        else:
            convert(architecture, checkpoint, folder)
        if architecture.full.text_encoder is not None:
            vocabulary, merges = (_fetched(name)[0] for name in TOKENIZER)
            write_tokenizer(vocabulary, merges, folder)
        manifest.write(folder)
    print(f"{task.name}: {task.checkpoint}, the {architecture.title} of {checkpoint}")


def _fetched(name: str) -> tuple[Path, str | None]:
    """The file of a source, checked, and which member of it is meant, if it is an archive."""
    source = sources.find(sources.load(SOURCES), name)
    path, again = DOWNLOADS / source.file, f"run `python -m benchmarks fetch --source {name}` in the suite's folder"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {again}")
    try:
        sources.verify(path, source)
    except sources.Mismatch as reason:
        raise ValueError(f"{path} is not {name}: {reason}: delete it and {again}") from None
    return path, source.member
