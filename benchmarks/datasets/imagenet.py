"""ImageNet (ILSVRC 2012; Russakovsky et al., 2015) as ADM's loader reads it for its reference statistics.

Where: image-net.org, after registration, for non-commercial research. Layout: a folder with either the 1,281,167
training images `n01440764_10026.JPEG` or the 50,000 validation images `ILSVRC2012_val_00000001.JPEG`, in sub-folders or
not. The papers compare with the whole training set, whose statistics ADM publishes: give that file as `statistics`.

Validation images are in the order of their numbers, which mixes the classes. Of the training images the first of each
class comes first, then the second of each, and so on: the first 50,000 are 50 of each class.

Each image: RGB (some files are CMYK or greyscale, one is a PNG), both sides halved by averaging while the shorter is at
least twice the resolution, PIL's bicubic to a shorter side of the resolution, and the centre square.
Some are photographs that their EXIF data turn; ADM's loader leaves them as they are stored.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from benchmarks.datasets import Dataset, Images
from benchmarks.datasets._originals import Original, folder
from benchmarks.datasets._originals import images as read_originals
from benchmarks.datasets._resize import halved_then_centre

VALIDATION = "ILSVRC2012_val_"
ORIGINAL = Original(
    names=rf"(n\d{{8}}_\d+|{VALIDATION}\d{{8}})\.JPEG",
    formats=("JPEG", "MPO", "PNG"),
    advice="use the training or the validation images of ILSVRC 2012 as image-net.org gives them out",
    as_stored=True,
)


def by_turns(paths: Iterable[str]) -> list[str]:
    """Validation images by name; training images in rounds of one image a class. Where they lie does not matter.

    Raises ValueError if both kinds are there.
    """
    classes: dict[str, list[str]] = defaultdict(list)
    for path in sorted(paths, key=lambda path: PurePosixPath(path).name):
        name = PurePosixPath(path).name
        classes[VALIDATION if name.startswith(VALIDATION) else name.split("_")[0]].append(path)
    if VALIDATION in classes and len(classes) > 1:
        raise ValueError("training and validation images of ImageNet lie in one folder: give the path of one of them")
    turns = [(turn, name, path) for name, members in classes.items() for turn, path in enumerate(members)]
    return [path for _, _, path in sorted(turns)]


def images(path: Path, resolution: int) -> Images:
    """The training or the validation images."""
    return read_originals(folder(path, ORIGINAL, by_turns), ORIGINAL, resolution, halved_then_centre)


DATASET = Dataset("imagenet-adm@1 (halved by averaging, PIL bicubic, centre square)", images)
