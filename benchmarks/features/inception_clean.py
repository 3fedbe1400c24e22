"""The FID Inception network behind the resize of clean-fid (Parmar et al., 2022, arXiv:2104.11222).

Images are resized to 299 x 299 with Pillow's antialiased bicubic filter, and cut off at 0 and 255 but not rounded.
torch's antialiased bicubic filter is the same, and runs on the images' device. Network and weights are those of
`inception`, whose resize has no antialiasing: the two distances differ.
"""

from pathlib import Path

from torch import Tensor
from torch.nn import functional

from benchmarks.features import Extractor
from benchmarks.features.inception import Inception, load_network

RESOLUTION = 299


def resize_clean(images: Tensor) -> Tensor:
    """Float32 images [B, 3, 299, 299] with values from 0 to 255, of uint8 images [B, 3, H, W]."""
    # In float64, as Pillow computes its weights: in float32 they would be off by 1e-3 grey levels.
    resized = functional.interpolate(images.double(), size=(RESOLUTION, RESOLUTION), mode="bicubic", antialias=True)
    return resized.float().clamp(0, 255)


def load(path: Path) -> Inception:
    """The evaluator with the weights of a `.pth` or `.safetensors` file; errors as `inception.load_network` raises."""
    return Inception(load_network(path), prepare=resize_clean)


EXTRACTOR = Extractor(
    name="inception_clean",
    version=1,
    resolution=RESOLUTION,
    batch=64,
    distance_label="clean FID",
    weights="inception",
    keeps_maps=False,
    load=load,
)
