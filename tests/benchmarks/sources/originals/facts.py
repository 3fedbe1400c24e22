"""Reads the facts about the published checkpoints; tests/data/originals/README.md explains them."""

from __future__ import annotations

import gzip
import json

from tests import vectors

_FACTS = json.loads(gzip.decompress((vectors.folder("originals") / "checkpoints.json.gz").read_bytes()))
MODELS = tuple(_FACTS)


def of(model: str) -> dict:
    """The facts about a published model. They are shared: do not change them in place."""
    return _FACTS[model]
