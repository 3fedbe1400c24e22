"""Prompts from COCO 2014: lists of caption ids stand in the repository, the captions come from COCO's archive."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.runtime.files import write_text
from benchmarks.runtime.text import read_lines
from benchmarks.sources import disk
from benchmarks.sources.archive import Mismatch, extract_member

YEAR = 2014
# Calibration and evaluation have captions of different images: COCO's training and validation images.
MEMBERS = {"calibration": "captions_train2014.json", "evaluation": "captions_val2014.json"}


def write_prompts(archive: Path, folder: Path) -> dict[Path, int]:
    """Write the captions that ``<purpose>.ids`` in ``folder`` list to ``<purpose>.txt``, a line each, in their order.

    ``archive`` is COCO's annotations_trainval2014.zip. Returns how many each file has. Raises Mismatch if the archive
    is another one or lacks a listed caption, naming one, and ValueError if it is missing; then no file is written.
    """
    texts = {}
    disk.sweep(archive)
    unpacked = archive.with_name(f".{archive.name}.{os.getpid()}")
    try:
        for purpose, member in MEMBERS.items():
            ids = read_ids(folder / f"{purpose}.ids")
            extract_member(archive, member, unpacked / member)
            texts[folder / f"{purpose}.txt"] = captions_of(unpacked / member, ids)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    for path, lines in texts.items():
        write_text(path, "".join(f"{line}\n" for line in lines))
    return {path: len(lines) for path, lines in texts.items()}


def read_ids(path: Path) -> list[int]:
    """The caption ids of a list, one a line. Raises ValueError naming the line that is none, or comes twice."""
    if not path.is_file():
        raise ValueError(f"there is no list of captions {path}: restore it from git")
    ids: dict[int, None] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not (line.isascii() and line.isdigit()):
            raise ValueError(f"{path}: line {number} is {line!r}, but must be a caption id: restore the list from git")
        if int(line) in ids:
            raise ValueError(f"{path}: line {number} has caption {line} a second time: restore the list from git")
        ids[int(line)] = None
    return list(ids)


def captions_of(annotations: Path, ids: Sequence[int]) -> list[str]:
    """The captions of these ids, each as one line, from a COCO caption file.

    Raises Mismatch if it is no caption file of 2014, or of other images than those that the ids are of.
    """
    try:
        document = json.loads(annotations.read_text(encoding="utf-8"))
        year = document["info"]["year"]
        texts = {int(entry["id"]): " ".join(entry["caption"].split()) for entry in document["annotations"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Mismatch(f"its {annotations.name} is not a COCO caption file ({error!r})") from None
    if year != YEAR:
        raise Mismatch(f"its {annotations.name} is of {year}, but the lists of captions are of {YEAR}")
    missing = [each for each in ids if not texts.get(each)]
    if missing:
        raise Mismatch(
            f"its {annotations.name} lacks {len(missing)} of the {len(ids)} listed captions, such as {missing[0]}, and"
            f" so is of another year or other images than COCO's own file of {YEAR}"
        )
    return [texts[each] for each in ids]
