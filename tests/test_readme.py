"""The README's example runs as it stands, on a tiny checkpoint."""

from __future__ import annotations

import re

from benchmarks.models.ldm import FAMILY


def test_the_example_runs(root, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    FAMILY.save_tiny(tmp_path / "data" / "emoji-ldm4", 0)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code.replace("iterations=100", "iterations=2").replace("steps=20", "steps=4"), names)
    assert len(names["images"]) == 4 and names["images"][0].size == (32, 32)
    assert not any(row.reason for row in names["report"].coverage)
