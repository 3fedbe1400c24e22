"""MS-COCO 2014 (Lin et al., 2014): the photographs that the captions of the evaluation belong to, as squares.

Where: `val2014.zip` of cocodataset.org; the images have licences of their own (Flickr), the annotations are CC BY 4.0.
Layout: a folder, with sub-folders or not, of `COCO_val2014_000000000042.jpg` and so on. The originals are JPEG, which
is lossy; a PNG here is a copy.

The images are those of Karpathy's test split, 5,000 of val2014. `_coco_images.txt` lists their ids in the order of the
captions in `benchmarks/paper/prompts/coco/evaluation.ids`: the first n captions are of the first n images. (From
`original_image_to_caption.json` of the Python package `eccv-caption` 0.1.0, MIT.) With `images.txt` in the folder,
those that it lists are taken instead.

Each image: RGB, centre square as wide as the shorter side, PIL's bicubic to the resolution. The papers do not say how
photographs became squares; this is the way of latent diffusion's own loader of LSUN.
"""

from pathlib import Path

from benchmarks.datasets import Dataset, Images
from benchmarks.datasets._originals import Original, folder, listed
from benchmarks.datasets._originals import images as read_originals
from benchmarks.datasets._resize import centre_square

IDS = Path(__file__).with_name("_coco_images.txt")
ORIGINAL = Original(
    names=r"COCO_val2014_\d{12}\.jpg",
    formats=("JPEG", "MPO"),
    advice="unpack val2014.zip of MS-COCO 2014",
)


def images(path: Path, resolution: int) -> Images:
    """The photographs."""
    wanted = [f"COCO_val2014_{int(number):012d}" for number in listed(IDS)]
    return read_originals(folder(path, ORIGINAL, wanted=wanted), ORIGINAL, resolution, centre_square)


DATASET = Dataset("coco-karpathy-test@1 (centre square, PIL bicubic)", images)
