"""The README's example runs as it stands, and what the pages name is there: files, headings, nox sessions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.report import tables
from benchmarks.suite import discover

ROOT = Path(__file__).parents[1]
DOCS = [f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_the_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    discover.family("ldm").save_tiny(tmp_path / "data" / "emoji-ldm4", 0)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    code = code.replace("recommended_recipe()", "recommended_recipe(16, 4, tuning_iterations=2)")
    exec(re.sub(r"steps=20\b", "steps=4", code), names)
    images = names["images"]
    assert len(images) == 4
    assert all(min(image.size) >= 32 and any(low < high for low, high in image.getextrema()) for image in images)
    assert not any(row.reason for row in names["report"].coverage)


def test_a_picture_comes_first():
    title, picture = [line for line in read("README.md").splitlines() if line][:2]
    assert title == "# tfmq-bench" and picture.startswith("![")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = ROOT / page if not path else (ROOT / page).parent / path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], target


def test_the_nox_sessions_that_pages_name_exist():
    code = read("noxfile.py")
    sessions = set(re.findall(r"^@nox\.session\ndef (\w+)", code, re.MULTILINE))
    sessions |= set(re.findall(r'^@nox\.session\(name="([\w-]+)"', code, re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"nox -s ([\w-]+)", read(page))}
    assert {"bench", "bench-smoke", "reproduce"} <= named <= sessions


def test_the_summary_is_that_of_the_results_page():
    summary = tables.region(read("README.md"))
    assert "| w4a8" in summary and len(summary.splitlines()) < 12
    assert summary in read("results/README.md")
