"""Reported numbers beside measured ones."""

import csv
import dataclasses
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.metrics import metrics
from benchmarks.report import tables
from benchmarks.suite import params, sections
from benchmarks.suite.record import Cost, Record, Value

COLUMNS = ["task", "method", "precision", "metric", "value", "marker", "images", "source"]
TASK = {
    "version": 1,
    "family": "ldm",
    "checkpoint": "data/rooms",
    "statistics": "downloads/rooms.npz",
    "resolution": 256,
    "scheduler": "ddim",
    "steps": 200,
    "eta": 1.0,
    "guidance_scale": 1.0,
    "images": 50000,
    "batch": 50,
    "calibration_images": 256,
    "reference_images": 0,
    "evaluator": "inception",
}
TABLE = {"protocol": "published", "tasks": ["rooms"], "precisions": ["w4a8"], "methods": ["tfmq", "qdiffusion"]}
NUMBERS = [
    ("lsun", "full_precision", "w32a32", "fid", "2.98", "", "50000", "a poster"),
    ("lsun", "full_precision", "w32a32", "sfid", "7.09", "", "50000", "a poster"),
    ("lsun", "qdiffusion", "w4a8", "fid", "6.40", "†", "50000", "a poster"),
    ("lsun", "qdiffusion", "w8a8", "fid", "4.51", "*", "50000", "a poster"),
    ("lsun", "tfmq", "w4a8", "fid", "3.68", "", "50000", "a poster"),
    ("lsun", "tfmq", "w4a8", "sfid", "7.65", "", "", "notes"),
    ("lsun", "tfmq", "w4a8", "clip", "0.3128", "", "50000", "a poster"),
    ("lsun", "tfmq", "", "quantization_speedup_vs_previous", "2.0", "", "", "an abstract"),
    ("lsun-cpu", "full_precision", "w32a32", "unet_size_mb", "1045.44", "", "", "a poster"),
    ("lsun-cpu", "openvino", "w8a8", "latency_s", "33.93", "", "", "a poster"),
    ("unnamed-gpu", "tfmq", "", "speedup", "5.76", "", "", "notes"),
    ("elsewhere", "tfmq", "w4a8", "fid", "1.00", "", "50000", "a poster"),
]


def frame(numbers):
    return pd.DataFrame(numbers, columns=COLUMNS)


@pytest.fixture
def suite():
    return params.parse(
        {
            "name": "paper",
            "tasks": {"rooms": TASK},
            "tables": {"published": TABLE},
            "methods": {"tfmq": {}, "qdiffusion": {}},
            "reported": {
                "tasks": {"rooms": ["lsun", "lsun-cpu", "unnamed-gpu"]},
                "tolerances": {"fd_data": 0.3, "sfd_data": 0.5, "clip_score": 0.1, "size_mib": 10},
            },
        }
    )


def record(method, precision, count=50000, evaluator="inception", size=1045.44, **values):
    return Record(
        task="rooms",
        task_version=1,
        method=method,
        precision=precision,
        seed=0,
        protocol="shared" if method == "full_precision" else "published",
        settings={"task": TASK | {"name": "rooms", "evaluator": evaluator}, "method": {}},
        status="measured",
        reason="",
        metrics={name: Value(value, value - 0.1, value + 0.1, count) for name, value in values.items()},
        cost=Cost(
            "an accelerator",
            {"calibrate": 60.0, "block reconstruction": 7140.0, "sample": 9.0},
            1.0,
            1,
            1,
            size,
            1045.44,
        ),
        coverage={},
        details={},
        inputs={},
        environment={},
    )


def read(text):
    """Rows of all tables under the name of the reported numbers, each a dictionary by heading."""
    found = {}
    for part in text.split("Reported as `")[1:]:
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")]
        found[part.split("`")[0]] = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    return found


def test_every_reported_number_stands_there_though_nothing_is_measured(suite):
    text = tables.paper([], suite, tables.numbers_of(frame(NUMBERS)))
    shown = read(text)
    rows = [(row["Precision"], row["Method"], row["FID ↓ reported"]) for row in shown["lsun"]]
    assert rows == [
        ("w32a32", "Full precision", "2.98"),
        ("w8a8", "Q-Diffusion", "4.51\\*"),
        ("w4a8", "Q-Diffusion", "6.40†"),
        ("w4a8", "TFMQ-DM", "3.68"),
    ]
    unmeasured = "no cell of this suite"
    differences = [row[name] for row in shown["lsun"] for name in row if name.endswith("difference")]
    assert differences.count("not measured here") == 6 and set(differences) == {"not measured here", unmeasured, "–"}
    assert shown["lsun"][1]["FID ↓ difference"] == unmeasured, "the suite has no w8a8"
    assert all(row[name] == "–" for row in shown["lsun"] for name in row if name.endswith("measured"))
    assert shown["lsun"][3]["CLIP ↑ reported"] == "31.28" and "IS ↑ reported" not in shown["lsun"][3]
    assert shown["lsun-cpu"][1]["Latency (s) ↓"] == "33.93, not measured here"
    assert "TFMQ-DM, at no stated precision: 2.0 (source 3), not measured here." in text
    sentence = "Speed-up of TFMQ-DM, at no stated precision: 5.76 (source 2), not measured here."
    assert f"Reported as `unnamed-gpu`:\n\n{sentence}" in text
    assert "1.00" not in text, "it is of another task"
    for part in ("200 DDIM steps, eta 1", "50000 images", "FID 0.3", "\\* run by", "† run by", "1 a poster; 2 notes"):
        assert part in text
    assert "failed" not in text


def test_a_measured_number_is_within_its_tolerance_or_outside(suite):
    cells = [
        record("full_precision", "w32a32", fd_data=3.28, sfd_data=7.7),
        record("tfmq", "w4a8", fd_data=3.379, sfd_data=8.0, clip_score=31.2, size=140.0),
        record("qdiffusion", "w4a8", fd_data=6.5, count=5000),
    ]
    full, unmeasured, other, within = read(tables.paper(cells, suite, tables.numbers_of(frame(NUMBERS))))["lsun"]
    assert full["FID ↓ measured"] == "3.28 [3.18, 3.38] (n 50,000)"
    assert full["FID ↓ difference"] == "+0.30, within" and full["sFID ↓ difference"] == "+0.61, outside"
    assert within["Method"] == "TFMQ-DM (published)"
    assert within["FID ↓ difference"] == "-0.30, outside" and within["sFID ↓ difference"] == "+0.35, within"
    assert within["CLIP ↑ difference"] == "-0.08, within" and within["Quantisation time"] == "2.0 h"
    assert within["UNet (MiB)"] == "140.00" and within["Source"] == "1, 2"
    assert other["FID ↓ difference"] == "+0.10, other n", "FID falls with the count of images"
    assert unmeasured["FID ↓ difference"] == "no cell of this suite"


def test_sizes_are_compared_and_latencies_are_not(suite):
    cells = [record("full_precision", "w32a32", fd_data=3.0, size=1045.44)]
    full, openvino = read(tables.paper(cells, suite, tables.numbers_of(frame(NUMBERS))))["lsun-cpu"]
    assert full["UNet (MiB) ↓ measured"] == "1045.44" and full["UNet (MiB) ↓ difference"] == "+0.00, within"
    assert openvino["Method"] == "openvino" and openvino["UNet (MiB) ↓ difference"] == "–"


def test_distances_on_other_features_are_not_compared(suite):
    cells = [record("full_precision", "w32a32", evaluator="efficientnet_lite0", fd_data=3.0)]
    numbers = tables.numbers_of(frame(NUMBERS))
    full = read(tables.paper(cells, suite, numbers))["lsun"][0]
    assert full["FID ↓ measured"] == "–" and full["FID ↓ difference"] == "not measured here"
    assert tables.reported_gates(cells, suite, numbers) == {}


def test_both_protocols_of_a_method_have_a_row_and_a_note_says_what_went_wrong(suite):
    cell = record("tfmq", "w4a8", fd_data=3.7)
    shared = dataclasses.replace(cell, protocol="shared", status="unverified", reason="a | b")
    absent = dataclasses.replace(cell, method="qdiffusion", status="not applicable", reason="c", metrics={}, cost=None)
    text = tables.paper([cell, shared, absent], suite, tables.numbers_of(frame(NUMBERS)))
    assert "| unverified: a \\| b |" in text
    rows = read(text.replace("\\|", "or"))["lsun"]
    assert {row["Method"]: row["Note"] for row in rows if row["Precision"] == "w4a8"} == {
        "TFMQ-DM (published)": "",
        "TFMQ-DM": "unverified: a or b",
        "Q-Diffusion (published)": "not applicable: c",
    }


def test_full_precision_gates_its_task_by_the_reported_number(suite):
    numbers = tables.numbers_of(frame(NUMBERS))
    near, far = (record("full_precision", "w32a32", fd_data=value, sfd_data=7.0) for value in (3.28, 3.29))
    other = record("full_precision", "w32a32", fd_data=40.0, count=5000)
    quantized = record("tfmq", "w4a8", fd_data=3.7)
    for full, status in ((near, "measured"), (far, "unverified"), (other, "measured")):
        gates = tables.reported_gates([full, quantized], suite, numbers)
        assert tables.gated([full, quantized], gates)[1].status == status
    bounds = tables.reported_gates([near], suite, numbers)["rooms"]
    assert set(bounds) == {"fd_data", "sfd_data"} and bounds["fd_data"] == pytest.approx((2.68, 3.28))


@pytest.mark.parametrize(
    ("reported", "message"),
    [
        ({"tasks": {"rooms": ["lsnu"]}, "tolerances": {}}, "did you mean 'lsun'"),
        ({"tasks": {"rooms": ["lsun"]}, "tolerances": {"fd_dat": 1}}, "did you mean 'fd_data'"),
    ],
)
def test_names_that_are_none_are_refused(suite, reported, message):
    wrong = dataclasses.replace(
        suite, reported=sections.Reported({k: tuple(v) for k, v in reported["tasks"].items()}, reported["tolerances"])
    )
    with pytest.raises(ValueError, match=message):
        tables.paper([], wrong, tables.numbers_of(frame(NUMBERS)))


def test_a_metric_without_a_column_is_refused():
    with pytest.raises(ValueError, match="did you mean 'fid'"):
        tables.numbers_of(frame([("lsun", "tfmq", "w4a8", "fidd", "1", "", "", "a poster")]))


def test_a_suite_refuses_reported_numbers_of_no_task(suite):
    with pytest.raises(ValueError, match="did you mean 'rooms'"):
        dataclasses.replace(suite, reported=sections.Reported({"room": ("lsun",)}, {}))
    with pytest.raises(ValueError, match="at least 0"):
        sections.Reported({}, {"fd_data": -0.1})


def test_this_repositorys_numbers_are_there_once_and_compare_with_metrics_that_exist(root):
    reported = pd.read_csv(root / "baselines/reported.csv", dtype=str, keep_default_na=False)
    assert list(reported.columns) == COLUMNS
    numbers = tables.numbers_of(reported)
    keys = [(found.task, found.method, found.precision, found.metric) for found in numbers]
    assert len(set(keys)) == len(keys) == len(reported)
    assert {found.column.ours for found in numbers} <= {*metrics(), "size_mib", None}
    assert {found.marker for found in numbers} <= {"", "*", "†"}
    size = next(found for found in numbers if found.task == "sd-v1-4-cpu" and found.method == "full_precision")
    assert size.scaled == pytest.approx(859_520_964 * 4 / 2**20, abs=0.01), "what the poster calls MB are MiB"


def test_this_repositorys_numbers_are_those_of_the_poster(root):
    path = root.parent / "shared/reference/paper_results.csv"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    methods = {"fp": "full_precision"} | {f"ablation-{name}": name for name in ("prev", "freeze")}
    methods["ablation-fp"] = "full_precision"
    ours, lines = (_lines(file) for file in (root / "baselines/reported.csv", path))
    keys = ("task", "method", "precision", "metric")
    found = {tuple(line[key] for key in keys): (line["value"], line["marker"]) for line in ours}
    assert len(lines) > 150
    for line in lines:
        bits = line["bits_w/a"]
        precision = "w{}a{}".format(*bits.split("/")) if bits else ""
        key = (line["family"], methods.get(line["method"], line["method"]), precision, line["metric"])
        assert found[key] == (line["value"], line["marker"]), key


def _lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
