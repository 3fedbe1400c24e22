"""The README's examples run as they stand, on tiny checkpoints."""

from __future__ import annotations

import re

import pytest

from benchmarks.suite import discover

EXAMPLES = (("ldm", "emoji-ldm4"), ("stable_diffusion", "emoji-text"))


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_example_runs(root, tmp_path, monkeypatch, number):
    found = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == len(EXAMPLES)
    family, name = EXAMPLES[number]
    discover.family(family).save_tiny(tmp_path / "data" / name, 0)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    code = found[number].replace("iterations=100", "iterations=2")
    exec(re.sub(r"steps=20\b", "steps=4", code), names)
    images = names["images"] if "images" in names else [names["image"]]
    assert all(min(image.size) >= 32 and any(low < high for low, high in image.getextrema()) for image in images)
    assert not any(row.reason for row in names["report"].coverage)
