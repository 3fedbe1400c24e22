"""Text files as editors write them: prompts, lists, settings and logs are read right, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.runtime.text import read_json_lines, read_lines, read_text, read_yaml
from benchmarks.sources.coco_captions import read_ids
from benchmarks.stages._setup import prompts_of
from benchmarks.suite import params
from benchmarks.suite.record import Record

LINES = ["a café, “quoted”", "", "模型 🐈", "with\u2028a separator and a\x0bvertical tab, and a\x85next line"]
TEXT = "\n".join(LINES)
WRITTEN = {
    "as git keeps it": (TEXT + "\n").encode(),
    "no newline at the end": TEXT.encode(),
    "byte order mark": b"\xef\xbb\xbf" + (TEXT + "\n").encode(),
    "Windows": (TEXT + "\n").replace("\n", "\r\n").encode(),
    "Windows, byte order mark": b"\xef\xbb\xbf" + (TEXT + "\n").replace("\n", "\r\n").encode(),
    "old Macintosh": (TEXT + "\n").replace("\n", "\r").encode(),
    "UTF-16": (TEXT + "\n").encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + (TEXT + "\n").encode("utf-16-be"),
    "blank lines at the end": (TEXT + "\n\n  \n\r\n").encode(),
}


@pytest.mark.parametrize("data", WRITTEN.values(), ids=WRITTEN)
def test_lines_are_the_same_whatever_editor_wrote_them(data, tmp_path):
    path = tmp_path / "Prompts für 模型.txt"
    path.write_bytes(data)
    assert read_lines(path) == LINES


REFUSED = {
    "Latin 1": ("a\nb\ncafé".encode("latin-1"), r"is not UTF-8 \(line 3\): save it as UTF-8"),
    "UTF-16 without a mark": ("a cat\n".encode("utf-16-le"), "holds zero bytes, as UTF-16 without a byte order mark"),
    "half of UTF-16": (b"\xff\xfea\x00\n\x00b", r"is not UTF-8 \(line 2\)"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00", "is not UTF-8"),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED)
def test_other_encodings_are_refused_by_name(data, message, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"prompts.txt {message}") as raised:
        read_text(path)
    assert "\n" not in str(raised.value)


def test_committed_lists_read_as_they_did():
    for path in sorted(Path("benchmarks").rglob("prompts/**/*.txt")):
        assert read_lines(path) == path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf7\r\n12\r\n\r\n", b"7\r12", "7\n12\n".encode("utf-16")])
def test_lists_of_ids(data, tmp_path):
    path = tmp_path / "evaluation.ids"
    path.write_bytes(data)
    assert read_ids(path) == [7, 12]
    path.write_bytes(b"7\n\n12\n")
    with pytest.raises(ValueError, match="line 2 is ''"):
        read_ids(path)


def test_prompts_of_a_task(tmp_path, monkeypatch):
    from benchmarks.stages import _setup

    monkeypatch.setattr(_setup, "prompt_file", lambda task, purpose: tmp_path / f"{purpose}.txt")
    (tmp_path / "evaluation.txt").write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n\r\n")
    assert prompts_of(None, "evaluation", range(3)) == ["a cat", "a dog", "a cat"]
    (tmp_path / "evaluation.txt").write_bytes("un café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"evaluation\.txt is not UTF-8"):
        prompts_of(None, "evaluation", range(1))


SETTINGS = {
    "tab": ("methods:\n\tnearest: 1\n", "not valid YAML: .*indent with spaces, not with tabs"),
    "key given twice": ("tasks:\n  a: {steps: 5}\n  a: {steps: 6}\n", "the key 'a' is given twice.*line 3"),
    "key given twice, apart": ("methods: {}\ntasks: {}\nmethods: {}\n", "the key 'methods' is given twice"),
    "half a file": ("tasks: {a: [1,\n", "not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_are_wrong_say_so_in_one_line(text, message, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    for read in (read_yaml, params.load):
        with pytest.raises(ValueError, match=rf"params\.yaml .*{message}") as raised:
            read(path)
        assert "\n" not in str(raised.value)


def test_settings_are_read_whatever_editor_wrote_them(tmp_path):
    text = "base: &base {steps: 5, eta: 0.0}\ntask:\n  <<: *base\n  eta: 1.0\nname: für\n"
    expected = {"base": {"steps": 5, "eta": 0.0}, "task": {"steps": 5, "eta": 1.0}, "name": "für"}
    path = tmp_path / "params.yaml"
    for data in (text.encode(), b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(), text.encode("utf-16")):
        path.write_bytes(data)
        assert read_yaml(path) == expected


def test_half_written_records_and_logs_are_named(tmp_path):
    record = sorted(Path("results/records").rglob("*.json"))[0]
    assert Record.load(record) == Record.from_json(record.read_text(encoding="utf-8"))
    half = tmp_path / "w4a8.json"
    half.write_bytes(record.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"w4a8\.json: the record is damaged or half-written .*score the cell again"):
        Record.load(half)
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"iteration": 1}) + '\n{"iterat', encoding="utf-8")
    with pytest.raises(ValueError, match=r"log\.jsonl: line 2 is no JSON, or half-written"):
        read_json_lines(log)
