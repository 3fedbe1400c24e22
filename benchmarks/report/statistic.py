"""One number a row from the values of its images: the candidates, and the one that rows rank and are judged by.

Every candidate is smaller for a better row. Those that are a mean over images of a number of one image can be judged
image by image, so one of them has to be `RANKED_BY`; `results/RANKING.md` says how all of them do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import trim_mean

from benchmarks.metrics import Metric
from benchmarks.suite.record import Record

Values = Mapping[str, np.ndarray]
# Of the images at each end, the share that a trimmed mean leaves out.
TRIMMED = 0.1
# How a metric becomes an amplitude, so that half the error is half of it: distances that are squares of differences
# count half in logarithms.
SQUARES = ("feature_distance", "perceptual")
IMAGE_METRICS = ("feature_distance", "perceptual", "psnr")


@dataclass(frozen=True)
class Statistic:
    """One number of a row.

    Attributes:
        name: short.
        label: heading of its column.
        meaning: what it is, in words.
        metrics: what it is made of.
        location: of what images have (N,) to one number; None of a metric that has no values of images, and stands in
            the record as it is.
        logarithm: whether images have the logarithm of their amplitude: its mean is that of a geometric mean.
    """

    name: str
    label: str
    meaning: str
    metrics: tuple[str, ...]
    location: Callable[[np.ndarray], float] | None = np.mean
    logarithm: bool = False

    @property
    def is_mean(self) -> bool:
        """Whether it is a mean over images, which the model of `benchmarks.report.inference` is of."""
        return self.location is np.mean

    def of_images(self, values: Values, metrics: Mapping[str, Metric]) -> np.ndarray | None:
        """What each image has (N,): a metric or, of several, the mean of their logarithms; None if one is not there.

        Of metrics of unequally many images those count that all have.
        """
        if self.location is None or any(name not in values for name in self.metrics):
            return None
        if not self.logarithm:
            return values[self.metrics[0]]
        count = min(len(values[name]) for name in self.metrics)
        return np.mean([logarithm(metrics[name], values[name][:count]) for name in self.metrics], axis=0)

    def of(
        self, record: Record, scores: np.ndarray | None, metrics: Mapping[str, Metric], images: slice = slice(None)
    ) -> float | None:
        """The number of a cell, from what some of its images have; None if it is not measured.

        In logarithms but for `SIGNED`: what compares two of them is then no matter of units, nor of whether a distance
        is squared.
        """
        first = metrics[self.metrics[0]]
        if self.location is None:
            found = record.metrics.get(first.name)
            value = None if found is None else found.value
        else:
            value = None if scores is None else float(self.location(scores[images]))
        if value is None or self.logarithm or first.name in SIGNED:
            return value
        return float(np.log(max(value, 10.0**-first.digits)))


def logarithm(metric: Metric, values: np.ndarray) -> np.ndarray:
    """Logarithm of the amplitude of values (N,) of a metric.

    Values below the last decimal that tables show count as that. Decibels are logarithms already.
    """
    if metric.name == "psnr":
        return -values * np.log(10) / 20
    found = np.log(np.maximum(values, 10.0**-metric.digits))
    return found / 2 if metric.name in SQUARES else found


def _trimmed(values: np.ndarray) -> float:
    return float(trim_mean(values, TRIMMED))


# Estimates that may be below 0, and so have no logarithm.
SIGNED = ("kid_fp",)
FEATURES, PERCEPTUAL = ("feature_distance",), ("perceptual",)
PIXELS, NOISE = ("psnr",), ("noise_error",)
CANDIDATES = (
    Statistic("feature_mean", "Feature distance, mean", "what tables show as feature distance", FEATURES),
    Statistic("feature_median", "Feature distance, median", "that of the middle image", FEATURES, np.median, True),
    Statistic("feature_trimmed", "Feature distance, trimmed", f"without {TRIMMED:.0%} at each end", FEATURES, _trimmed),
    Statistic("feature_log", "Feature distance, logarithm", "geometric mean", FEATURES, logarithm=True),
    Statistic("perceptual_mean", "Perceptual distance, mean", "as tables show it", PERCEPTUAL),
    Statistic("perceptual_median", "Perceptual distance, median", "middle image", PERCEPTUAL, np.median, True),
    Statistic("perceptual_log", "Perceptual distance, logarithm", "geometric mean", PERCEPTUAL, logarithm=True),
    Statistic("pixel_log", "Pixel error, logarithm", "PSNR, mean over images", PIXELS, logarithm=True),
    Statistic("pixel_median", "Pixel error, median", "PSNR of the middle image", PIXELS, np.median, True),
    Statistic("noise_mean", "Noise error, mean", "what tables show as noise error", NOISE),
    Statistic("noise_log", "Noise error, logarithm", "geometric mean", NOISE, logarithm=True),
    Statistic(
        "image_deviation",
        "Image deviation",
        "the geometric mean, over images, of three errors against full precision: features, perceptual, pixels",
        IMAGE_METRICS,
        logarithm=True,
    ),
    Statistic(
        "deviation",
        "Deviation",
        "the geometric mean, over images, of four errors against full precision: features, perceptual, pixels, and the"
        " predicted noise",
        (*IMAGE_METRICS, "noise_error"),
        logarithm=True,
    ),
    Statistic("kid_fp", "KID to FP", "of all images together", ("kid_fp",), None),
    Statistic("fd_fp", "FD to FP", "of all images together", ("fd_fp",), None),
    Statistic("temporal_error", "Temporal error", "of no images", ("temporal_error",), None),
)
RANKED_BY = next(candidate for candidate in CANDIDATES if candidate.name == "deviation")
