import dataclasses
import io

import numpy as np
import pandas as pd
import pytest
from scipy.stats import gmean

from benchmarks.metrics import metrics
from benchmarks.report import tables
from benchmarks.report.tables.frame import STATUS_KEYS
from benchmarks.suite.record import Cost, Value
from benchmarks.suite.sections import TABLES

COLUMNS = metrics()


@pytest.fixture
def records(make_record):
    return [
        make_record(method="nearest", kid=(0.050, 0.045, 0.055)),
        make_record(method="qdiffusion", kid=(0.021, 0.018, 0.026)),
        make_record(method="tfmq", kid=(0.019, 0.015, 0.022)),
        make_record(method="tfmq", precision="w8a8", kid=(0.001, 0.0005, 0.002)),
        make_record(method="full_precision", precision="w32a32", kid=None),
    ]


@pytest.fixture
def ranked(rows):
    """Rows of which the first two are nearly alike, and one that was not measured."""
    rows.add("nearest", -1.0, noise=0.05)
    rows.add("qdiffusion", -1.99, noise=0.2)
    rows.add("tfmq", -2.0, noise=0.2)
    rows.add("tfmq", -3.0, precision="w8a8")
    rows.add("full_precision", -9.0, precision="w32a32")
    rows.records.append(rows.make_record(method="odd", status="failed", reason="x", metrics={}, cost=None))
    return rows


def test_the_caption_says_how_far_tf32_is_from_float32(make_record):
    """Of a task that lets full precision be drawn in it, where it has been."""

    def caption(found):
        full = make_record(method="full_precision", precision="w32a32", kid=None, details=found)
        return tables.section("leaderboard", [full, make_record()], COLUMNS, {}, {})

    distance = {"value": 0.0002, "low": 0.0001, "high": 0.0003, "n": 256}
    text = caption({"tf32": {"images": 256, "mean": 0.0012, "largest": 0.031, "feature_distance": distance}})
    assert "on the noise of the first 256 images, its latents differ by 0.0012 of their norm in the mean" in text
    assert "by 0.031 at most, and its feature distance is 0.000200 [0.000100, 0.000300]." in text
    text = caption({"tf32": {"images": 0, "mean": 0.0, "largest": 0.0, "feature_distance": None}})
    assert "may be drawn in TF32, which cpu does not have: it is in float32." in text
    assert "TF32" not in caption({})


def test_ranks_are_shared_where_no_difference_is_decided(ranked):
    found = tables.standings(ranked.records, ranked.judges)
    assert {cell.name: standing.rank for cell, standing in found.items()} == {
        "emoji-ldm4/nearest/w4a8": 3,
        "emoji-ldm4/qdiffusion/w4a8": 1,
        "emoji-ldm4/tfmq/w4a8": 1,
        "emoji-ldm4/tfmq/w8a8": 1,
    }
    value = found[ranked.records[0].cell].value
    assert value.value == pytest.approx(gmean(ranked.values[ranked.records[0].cell]["noise_error"]))
    assert value.low < value.value < value.high and value.n == 32


def test_paired_images_rank_rows_whose_own_intervals_overlap(rows):
    rows.add("tfmq", -2.0, noise=0.01)
    rows.add("nearest", -1.95, noise=0.01)
    first, second = tables.standings(rows.records, rows.judges).values()
    assert (first.rank, second.rank) == (1, 2) and first.value.high > second.value.low


def test_a_row_has_one_rank_at_all_its_seeds(rows):
    for seed, level in enumerate((-2.0, -1.5, -1.6)):
        rows.add("tfmq", level, seed=seed)
        rows.add("nearest", level + 0.3, seed=seed)
    found = tables.standings(rows.records, rows.judges)
    assert {cell.method: standing.rank for cell, standing in found.items()} == {"tfmq": 1, "nearest": 2}
    assert len(found) == 6 and len({standing.value.value for standing in found.values()}) == 2


def test_a_frame_has_its_rows_by_rank(ranked):
    table = tables.frame({"leaderboard": ranked.records}, COLUMNS, ranked.judges)
    of_w4a8 = table[table["precision"] == "w4a8"]
    assert of_w4a8["method"].tolist() == ["tfmq", "qdiffusion", "nearest", "odd"]
    assert of_w4a8["rank"].tolist()[:3] == [1, 1, 3] and pd.isna(of_w4a8["rank"].iloc[3])
    assert of_w4a8["deviation"].iloc[0] == pytest.approx(
        tables.standings(ranked.records, ranked.judges)[ranked.records[2].cell].value.value
    )
    assert {"deviation_low", "deviation_high", "deviation_n"} <= set(table)


def test_a_frame_has_a_row_a_cell_in_reading_order(records):
    table = tables.frame({"leaderboard": records}, COLUMNS, {})
    assert list(zip(table["precision"], table["method"], strict=True)) == [
        ("w32a32", "full_precision"),
        ("w8a8", "tfmq"),
        ("w4a8", "nearest"),
        ("w4a8", "qdiffusion"),
        ("w4a8", "tfmq"),
    ]
    assert table.loc[1, "kid_fp"] == 0.001
    assert table.loc[1, "kid_fp_high"] == 0.002
    assert table.loc[1, "kid_fp_n"] == 512
    assert pd.isna(table.loc[0, "kid_fp"])
    assert table.loc[1, "quantization_seconds"] == 25.0
    assert table.loc[1, "seconds_sample"] == 100.0
    assert table.loc[1, "seconds_block_reconstruction"] == 20.0


def test_no_metric_has_the_name_of_another_column():
    assert not set(COLUMNS) & {"table", "rank", *STATUS_KEYS}


def test_csv_reads_back(records):
    table = tables.frame({"leaderboard": records}, COLUMNS, {})
    again = pd.read_csv(io.StringIO(tables.csv(table)))
    assert list(again.columns) == list(table.columns)
    np.testing.assert_allclose(again["fd_data"], table["fd_data"])
    assert tables.csv(tables.frame({"leaderboard": records[::-1]}, COLUMNS, {})) == tables.csv(table)


def test_without_records_there_are_headings_alone():
    table = tables.frame({"leaderboard": []}, metrics(), {})
    assert len(table) == 0 and {"table", *STATUS_KEYS} <= set(pd.read_csv(io.StringIO(tables.csv(table))).columns)
    text = tables.report({}, metrics(), [], {}, {}, reported="as printed")
    assert "## Reported\n\nas printed" in text and "All metrics" not in text


def test_ranks_are_those_within_a_table(ranked):
    ranked.add("prev", 0.0)
    *others, worse = ranked.records
    table = tables.frame({"leaderboard": others, "ablation": [worse]}, COLUMNS, ranked.judges)
    assert table[["table", "method", "rank"]].iloc[-1].tolist() == ["ablation", "prev", 1]
    text = tables.ablation(ranked.records, COLUMNS, ranked.judges)
    assert "Rank" not in text and "Deviation ↓" in text


def test_a_table_says_which_rows_are_by_more_seeds_than_it_shows(rows):
    for seed in range(3):
        rows.add("tfmq", -2.0, seed=seed)
    rows.add("prev", -1.9)
    first, *_, other = rows.records
    said = "rows that another table measures with more calibration seeds"
    for show in (tables.ablation, tables.newer):
        assert said in show([first, other], COLUMNS, rows.judges)
        assert said not in show(rows.records, COLUMNS, rows.judges)


def test_the_ablation_keeps_the_order_it_is_given(records, make_record):
    better = make_record(method="prev", kid=(0.0, 0.0, 0.0))
    text = tables.ablation([*records, better], COLUMNS, {})
    names = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| w4a8")]
    assert names == ["Round-to-nearest", "Q-Diffusion", "TFMQ-DM", tables.label("prev")]
    assert "KID to FP ↓" in text and "PSNR" not in text and "Quantisation time" in text


def test_protocols_stand_side_by_side(make_record):
    cells = [
        make_record(method="tfmq", kid=(0.01, 0.0, 0.02)),
        make_record(method="tfmq", kid=(0.005, 0.0, 0.01), protocol="published"),
        make_record(method="nearest", kid=(0.03, 0.0, 0.04)),
        make_record(
            method="nearest", protocol="published", status="not applicable", reason="unknown", metrics={}, cost=None
        ),
    ]
    lines = [line for line in tables.own_layers(cells, COLUMNS, "published").splitlines() if line.startswith("| w4a8")]
    assert len(lines) == 2
    fields = [field.strip() for field in lines[0].split("|")]
    assert fields[2] == "TFMQ-DM" and fields[3].startswith("0.0100 [") and "0.0050 [0.0000, 0.0100]" in fields
    assert "in full precision" in lines[0]
    assert "not applicable: unknown" in lines[1] and "0.0300 [" in lines[1]


def test_what_released_codes_run_stands_beside_the_shared_layers(make_record):
    cells = [
        make_record(method=method, kid=(kid, 0.0, 0.02), protocol=protocol)
        for method in ("qdiffusion", "tfmq")
        for protocol, kid in (("shared", 0.01), ("as_run", 0.005))
    ]
    text = tables.own_layers(cells, COLUMNS, "as_run")
    lines = [line for line in text.splitlines() if line.startswith("| w4a8")]
    assert "KID to FP ↓, as_run" in text and all("0.0100 [" in line and "0.0050 [" in line for line in lines)
    assert "the first and last too; attention probabilities at 8 bits or more" in lines[0]
    assert "inputs of second time layer, first block convolution in full precision" in lines[1]


def test_executed_rows_stand_beside_simulated_ones(make_record):
    def cell(method, distance, **changes):
        measured = {"feature_distance": Value(distance, distance, distance, 4), "noise_error": Value(0.5, 0.5, 0.5, 4)}
        return make_record(**{"method": method, "metrics": measured} | changes)

    executed = {"protocol": "deployable", "backend": "executed"}
    refused = {"status": "not applicable", "reason": "low rank", "metrics": {}, "cost": None}
    cells = [
        cell("tfmq", 0.3),
        cell("tfmq", 0.25, **executed),
        cell("tfmq", 0.1, **executed, precision="w8a8"),
        cell("svdquant", 0.0, **executed | refused),
    ]
    images = {
        cells[0].cell: {"feature_distance": np.array([0.1, 0.2, 0.4, 0.5])},
        cells[1].cell: {"feature_distance": np.array([0.0, 0.2, 0.4, 0.4])},
        cells[2].cell: {"feature_distance": np.array([0.1, 0.1, 0.1, 0.1])},
    }
    lines = [line for line in tables.deployed(cells, COLUMNS, images).splitlines() if line.startswith("| w")]
    eight, tfmq, refused = ([field.strip() for field in line.split("|")[1:-1]] for line in lines)
    # The standard error of 0.1, 0, 0, 0.1 is 0.0577 / 2.
    assert tfmq[1:5] == ["TFMQ-DM", "0.3000", "0.2500", "-0.0500 [-0.1066, 0.0066]"]
    assert tfmq[5:8] == ["0.5000", "0.5000", "–"] and tfmq[-1] == ""
    assert eight[2:5] == ["–", "0.1000", "–"]
    assert refused[2:5] == ["–", "–", "–"] and refused[-1] == "not applicable: low rank"


def test_what_a_protocol_leaves_out_is_said_in_words():
    assert tables.left_out("nearest", "published") == "–" and tables.left_out("absent", "published") == "–"
    found = tables.left_out("tfmq", "published")
    assert "boundary" in found and "in full precision" in found


def test_the_leaderboard_shows_intervals_and_names_its_settings(ranked, records):
    text = tables.leaderboard(ranked.records, COLUMNS, ranked.judges)
    (line,) = [line for line in text.splitlines() if line.startswith("| w4a8        | TFMQ-DM ")]
    standing = tables.standings(ranked.records, ranked.judges)[ranked.records[2].cell].value
    rank, deviation = (field.strip() for field in line.split("|")[3:5])
    assert rank == "1" and deviation == f"{standing.value:.4f} [{standing.low:.4f}, {standing.high:.4f}]"
    text = tables.leaderboard(records, COLUMNS, {})
    assert "| w4a8        | TFMQ-DM          |      – | 0.0190 [0.0150, 0.0220] |" in text
    assert text.index("Full precision") < text.index("| w8a8")
    for part in ("FD512 to data", "512 images", "4096", "20 DDIM steps", "efficientnet_lite0", "`shared`", "simulated"):
        assert part in text
    assert "FID" not in text
    assert "Note" not in text and "Seed" not in text


def test_newer_methods_have_ranks_among_the_rows_beside_them(ranked):
    text = tables.section("newer", ranked.records, COLUMNS, {}, ranked.judges)
    ranks = {line.split("|")[2].strip(): line.split("|")[3].strip() for line in text.splitlines() if "| w4a8" in line}
    assert ranks == {"TFMQ-DM": "1", "Q-Diffusion": "1", "Round-to-nearest": "3", "odd": "–"}
    assert "Across tasks" not in text


@pytest.mark.parametrize("status", ["not applicable", "failed", "unverified"])
def test_what_was_not_measured_stays_visible(records, make_record, status):
    unverified = status == "unverified"
    cost = Cost("cpu", {"block reconstruction": 7200.0}, 1.0, 0, 0, 1.5, 9.75) if unverified else None
    changes = {} if unverified else {"metrics": {}}
    odd = make_record(method="odd", status=status, reason="a | b", cost=cost, **changes)
    text = tables.leaderboard([*records, odd], COLUMNS, {})
    (line,) = [line for line in text.splitlines() if "| odd" in line]
    assert f"{status}: a \\| b" in line
    assert "–" in line
    assert ("2.0 h" in line) == unverified


def test_seeds_are_a_column(make_record):
    def cell(method, seed, distance, **changes):
        measured = {"feature_distance": Value(distance, distance / 2, distance * 2, 512)}
        return make_record(method=method, seed=seed, metrics=measured, **changes)

    cells = [cell("tfmq", seed, distance) for seed, distance in enumerate((0.04, 0.05, 0.06))]
    cells += [cell("nearest", 0, 0.1), cell("nearest", 1, 0.3), cell("tfmq", 0, 0.01, precision="w8a8")]
    for text in (tables.leaderboard(cells, COLUMNS, {}), tables.ablation(cells, COLUMNS, {})):
        rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
        found = {(row[0], row[1]): dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
        assert len(found) == len(rows) - 2 == 3
        assert found["w4a8", "TFMQ-DM"]["Over 3 seeds"] == "0.0500 ± 0.0100"
        assert found["w4a8", "TFMQ-DM"]["Feature distance ↓"].startswith("0.0400")
        assert found["w4a8", "Round-to-nearest"]["Over 2 seeds"] == "0.2000 ± 0.1414"
        assert found["w4a8", "Round-to-nearest"]["Over 3 seeds"] == "–"
        assert found["w8a8", "TFMQ-DM"]["Over 3 seeds"] == "–"
        assert "standard deviation of the feature distance over calibration seeds" in text
    table = tables.frame({"leaderboard": cells}, COLUMNS, {})
    assert len(table) == 6 and table["seed"].max() == 2
    alone = tables.leaderboard(cells[:1], COLUMNS, {})
    assert "Over" not in alone and "standard deviation" not in alone


def test_a_clip_score_names_its_clip_and_is_left_out_where_there_is_none(make_record, task_settings):
    scored = {"task": task_settings | {"clip": ["data/toy-clip"]}, "method": {}, "clip": ["toy-clip 57934424"]}
    text = tables.leaderboard(
        [
            make_record(method="tfmq", settings=scored, metrics={"clip_score": Value(21.5, 21.0, 22.0, 512)}),
            make_record(settings=scored | {"clip": []}, status="failed", reason="x", metrics={}, cost=None),
        ],
        COLUMNS,
        {},
    )
    assert "CLIP score (toy-clip 57934424) ↑" in text and "21.50" in text and "100 x the cosine" in text
    assert "CLIP" not in tables.leaderboard([make_record()], COLUMNS, {})


def test_a_clip_score_stands_beside_that_of_real_images(make_record, task_settings):
    real = {"clip": "toy-clip 57934424", "score": 45.678, "images": 392}
    scored = {"task": task_settings | {"clip": ["data/toy-clip"]}, "method": {}, "clip": ["toy-clip 57934424"]}
    record = make_record(
        settings=scored | {"reference": {"clip": [real]}}, metrics={"clip_score": Value(21.5, 21.0, 22.0, 512)}
    )
    text = tables.leaderboard([record], COLUMNS, {})
    assert "CLIP score (toy-clip 57934424; real images 45.7) ↑" in text
    assert "392 real images that no model was trained on score 45.7 with their captions" in text


def test_records_that_cannot_be_compared_are_refused(make_record, task_settings):
    other = make_record(method="tfmq", settings={"task": task_settings | {"images": 64}, "method": {}})
    for different in (
        other,
        make_record(method="tfmq", task_version=2),
    ):
        with pytest.raises(ValueError, match="different settings of emoji-ldm4"):
            tables.frame({"leaderboard": [make_record(), different]}, COLUMNS, {})
    with pytest.raises(ValueError, match="there twice"):
        tables.frame({"leaderboard": [make_record()], "ablation": [make_record()]}, COLUMNS, {})
    with pytest.raises(ValueError, match="no records"):
        tables.leaderboard([], COLUMNS, {})
    with pytest.raises(ValueError, match="did you mean 'kid_fp'"):
        tables.frame({"leaderboard": [make_record(metrics={"kid_pf": Value(1.0, 1.0, 1.0, 2)})]}, COLUMNS, {})


def test_the_report_has_every_table_and_metric_and_the_figures(records):
    every = {name: Value(1.0, 0.5, 1.5, 9) for name in COLUMNS}
    records = [dataclasses.replace(record, metrics=every) for record in records]
    shown = {"leaderboard": records, "ablation": records}
    text = tables.report(shown, COLUMNS, [("Same noise", "figures/grid.png")], {}, {})
    assert (
        "## Leaderboard" in text and "## Ablation" in text and tables.leaderboard(records, COLUMNS, {}).strip() in text
    )
    for metric in COLUMNS.values():
        assert metric.title("FD", 512) in text
    assert "![Same noise](figures/grid.png)" in text
    assert text.endswith("\n") and not text.endswith("\n\n")


@pytest.mark.parametrize("name", TABLES)
def test_every_table_of_a_suite_has_a_section(records, name):
    shown = [
        dataclasses.replace(record, backend="executed" if name == "deployed" else "simulated") for record in records
    ]
    assert "### emoji-ldm4" in tables.section(name, shown, COLUMNS, {}, {})


def test_only_the_marked_region_changes():
    text = f"above\n{tables.START}\nold\n{tables.END}\nbelow\n"
    once = tables.replace_region(text, "new")
    assert once == f"above\n{tables.START}\n\nnew\n\n{tables.END}\nbelow\n"
    assert tables.replace_region(once, "new") == once
    assert tables.region(text) == "old"
    for broken in ("nothing", tables.START, tables.END + tables.START, text + text):
        with pytest.raises(ValueError, match="needs one"):
            tables.replace_region(broken, "new")


def test_a_full_precision_row_outside_its_gate_marks_the_whole_task(make_record):
    full = make_record(method="full_precision", precision="w32a32")
    cells = [full, make_record(), make_record(method="tfmq", status="failed", reason="x", metrics={}, cost=None)]
    assert tables.gated(cells, {"emoji-ldm4": {"fd_data": (12.0, 13.0)}}) == cells
    marked = tables.gated(cells, {"emoji-ldm4": {"fd_data": (1.0, 2.0)}})
    assert [record.status for record in marked] == ["unverified", "unverified", "failed"]
    assert marked[1].reason == "full precision has fd_data 12.5, expected 1 to 2"
    assert "unverified: full precision has fd_data 12.5" in tables.leaderboard(marked, COLUMNS, {})
