"""The page on temporal features says what its numbers say."""

import json

import numpy as np
import pytest

from benchmarks.report import temporal
from benchmarks.report.figures import png


def row(method: str, final: float, mistaken: float = 0.0, **changes: object) -> dict[str, object]:
    share = {"0": 4} if not mistaken else {"-60": 1, "-2": 1, "0": 1, "7": 1}
    return {
        "method": method,
        "precision": "w4a8",
        "status": "measured",
        "reason": "",
        "temporal_error": 1e-4,
        "relative_error": 0.02,
        "mistaken": mistaken,
        "mean_shift": 69 / 8 if mistaken else 0.0,
        "largest_shift": 60 if mistaken else 0,
        "shifts": {"1": {"0": 4}, "501": share},
        "exact": not final,
        "deviation": {"lower_quartile": [0.0, final / 2], "median": [final / 4, final], "upper_quartile": [final] * 2},
        "final_mean": {"value": final, "low": final / 2, "high": 2 * final, "n": 4},
    } | changes


ROWS = [row("tfmq", 0.03), row("nearest", 0.125, 3 / 8), row("cache", 0.001), row("full_precision_temporal", 0.0)]


@pytest.fixture
def page(tmp_path):
    def write(rows: list[dict[str, object]], **changes: object) -> str:
        described = {"task": "toy", "images": 4, "projections": ["a.proj"], "note": "", "steps": [1, 501]}
        found = described | {"training_steps": 1000, "rows": rows} | changes
        (tmp_path / "temporal").mkdir(exist_ok=True)
        (tmp_path / "temporal" / "toy.json").write_text(json.dumps(found))
        return temporal.write(tmp_path / "temporal", tmp_path / "figures", tmp_path / "TEMPORAL.md")

    return write


def test_rows_are_sorted_and_what_is_seen_is_said(page, tmp_path):
    text = page([*ROWS, row("gptq", 0, status="failed", reason="no quantised network")])
    assert text == (tmp_path / "TEMPORAL.md").read_text()
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    assert [cells[0].strip() for cells in table] == [
        "Base, temporal layers exact",
        "Cache alone",
        "TFMQ-DM",
        "Round-to-nearest",
    ]
    assert [cells[1].strip() for cells in table] == ["0, exact", "0.1", "3", "12.5"]
    assert table[3][2].strip() == "12.5 [6.25, 25]"
    assert (
        "3 of 4 methods keep every feature nearest to its own time step. Round-to-nearest has most that are not, "
        "37.5 %; the steps that they are taken for are 23.0 away on the average and 60 at most, where sampled steps "
        "are 500 apart."
    ) in text
    assert (
        "1 of 4 methods have full precision's own features, and so its images. The latents of the others end between "
        "0.1 % (Cache alone) and 12.5 % (Round-to-nearest) from full precision's."
    ) in text
    assert "GPTQ: failed: no quantised network." in text
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "toy-temporal-deviation-w4a8.png",
        "toy-temporal-mismatch-w4a8.png",
    }


def test_what_is_right_has_no_heat_map_and_what_is_exact_no_line(page, tmp_path):
    text = page([ROWS[3]])
    assert "None is taken for another one." in text and "Latents do not deviate." in text
    assert not (tmp_path / "figures" / "toy-temporal-mismatch-w4a8.png").exists()
    (axes,) = temporal.curves(ROWS, "toy").axes
    assert len(axes.get_lines()) == 3 and "0 throughout: Base, temporal layers exact" in axes.get_title()


def test_a_heat_map_has_the_share_of_layers_by_shift():
    shares = temporal.shares(ROWS[1]["shifts"])
    by_label = dict(zip(temporal.SHIFT_LABELS, shares.T.tolist(), strict=True))
    assert by_label.pop("0") == [1, 0.25] and by_label.pop("5") == by_label.pop("-2") == [0, 0.25]
    assert by_label.pop("≤ -50") == [0, 0.25] and not np.any(list(by_label.values()))
    edges = temporal.shares({"1": {"-50": 1}, "2": {"-49": 1}, "3": {"-1": 1}, "4": {"50": 1}, "5": {"49": 1}})
    assert [temporal.SHIFT_LABELS[i] for i in edges.argmax(1)] == ["≤ -50", "-20", "-1", "≥ 50", "20"]


def test_a_heat_map_shows_the_least_and_the_most_wrong_of_many():
    many = [row(f"row {index}", 0.1, mistaken=index / 20) for index in range(12)]
    figure = temporal.mismatch(many, "toy")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles) == temporal.PANELS and titles[0] == "row 1" and titles[-1] == "row 11"
    assert png(temporal.mismatch(many, "toy")) == png(figure)


def test_a_network_without_features_and_nothing_measured_are_said(page, tmp_path):
    assert "## toy\n\nNot applicable: no." in page([], projections=[], note="Not applicable: no.")
    empty = temporal.write(tmp_path / "none", tmp_path, tmp_path / "page.md")
    assert empty.endswith("Nothing has been measured yet.\n")
