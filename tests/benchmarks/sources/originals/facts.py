"""Reads the facts about the published checkpoints; tests/data/originals/README.md explains them."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

FILE = Path(__file__).parents[3] / "data" / "originals" / "checkpoints.json.gz"
MODELS = (
    "ldm4_lsun_bedrooms",
    "ldm4_celebahq",
    "ldm4_ffhq",
    "ldm8_lsun_churches",
    "ldm4_imagenet_cin256v2",
    "sd_v1_4",
    "ddim_cifar10",
)


@cache
def of(model: str) -> dict:
    """The facts about a published model. They are shared: do not change them in place."""
    return json.loads(gzip.decompress(FILE.read_bytes()))[model]
