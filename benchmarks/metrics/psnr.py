"""Peak signal-to-noise ratio of each image to the full-precision image of the same noise, in dB."""

import torch
from torch import Tensor

from benchmarks.metrics import Evidence, Metric
from benchmarks.metrics._interval import mean_of

# The mean squared error of rounding to 8 bits: images closer than this cannot be told apart, and the ratio stays finite
# for equal images, at 58.92 dB.
ROUNDING_ERROR = 1 / 12


def per_image(evidence: Evidence) -> Tensor | None:
    """10 log10(255^2 / mean squared error) of each pair in dB; None for full precision."""
    if evidence.squared_error is None:
        return None
    return 10 * torch.log10(255**2 / evidence.squared_error.double().clamp(min=ROUNDING_ERROR))


METRIC = Metric(
    name="psnr",
    position=50,
    label="PSNR (dB)",
    better="higher",
    digits=2,
    compute=mean_of(per_image),
    per_image=per_image,
    paired=True,
)
