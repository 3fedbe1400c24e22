from pathlib import Path

import pytest

from benchmarks.small import settings
from benchmarks.small.__main__ import main


def test_the_committed_settings_load(root: Path):
    found = settings.load(root / "benchmarks" / "small" / "params.yaml")
    assert list(found.packages) == ["google", "twitter"]
    assert found.first_stage.channels == (32, 64, 96)


def test_an_unknown_setting_is_named(root: Path, tmp_path: Path):
    text = (root / "benchmarks" / "small" / "params.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("peak_rate", "peek_rate"))
    with pytest.raises(ValueError, match="peek_rate"):
        settings.load(path)


def test_help_lists_the_steps(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "first-stage" in capsys.readouterr().out
