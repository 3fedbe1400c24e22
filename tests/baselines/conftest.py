"""Tests of one method run in one process, where what one of them quantises serves the others."""

from pathlib import Path

import pytest

from benchmarks.suite import discover


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    methods = set(discover.names(discover.METHODS))
    for item in items:
        if isinstance(item, pytest.Function) and item.path.is_relative_to(Path(__file__).parent):
            name = getattr(item, "callspec", None) and item.callspec.params.get("name")
            if name in methods:
                item.add_marker(pytest.mark.xdist_group(name))
