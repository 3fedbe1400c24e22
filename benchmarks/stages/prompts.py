"""prompts: the captions that the text-to-image task's committed lists name come out of COCO's annotations."""

from __future__ import annotations

from pathlib import Path

from benchmarks.sources import coco_captions
from benchmarks.sources.archive import Mismatch
from benchmarks.stages.fetch import checked, unfit

NAME = "coco-captions"
FOLDER = Path("prompts/coco")


def run() -> None:
    """Write ``calibration.txt`` and ``evaluation.txt``, a caption a line, in the order of the lists of ids beside them.

    Raises ValueError if the annotations are not fetched yet or are not those that the lists are of.
    """
    archive, _ = checked(NAME)
    try:
        counts = coco_captions.write_prompts(archive, FOLDER)
    except Mismatch as reason:
        raise unfit(NAME, archive, reason) from None
    print(", ".join(f"{path}: {count:,} captions" for path, count in counts.items()))
