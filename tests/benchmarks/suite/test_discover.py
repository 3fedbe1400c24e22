import sys

import pytest

from benchmarks.suite import discover


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "plugin_room"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "nearest.py").write_text("METHOD = 'rounds to nearest'\n")
    (folder / "_shared.py").write_text("raise AssertionError('not a plugin')\n")
    (folder / "empty.py").write_text("")
    (folder / "broken.py").write_text("raise AssertionError('never imported by names')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "plugin_room"
    for name in [name for name in sys.modules if name.startswith("plugin_room")]:
        del sys.modules[name]


def test_a_file_is_a_plugin(package):
    assert discover.names(package) == ("broken", "empty", "nearest")
    assert discover.find(package, "method", "nearest") == "rounds to nearest"


def test_an_unknown_name_gets_the_nearest(package):
    with pytest.raises(ValueError, match="unknown method 'nearst': did you mean 'nearest'.*plugin_room/nearst.py"):
        discover.find(package, "method", "nearst")
    with pytest.raises(ValueError, match="unknown method '_shared'"):
        discover.find(package, "method", "_shared")


def test_a_plugin_without_its_object_says_so(package):
    with pytest.raises(ValueError, match="plugin_room.empty has no METHOD"):
        discover.find(package, "method", "empty")


def test_every_method_of_this_repository_loads():
    for name in discover.names(discover.METHODS):
        assert discover.method(name) is not None


def test_every_family_of_this_repository_loads():
    for name in discover.names(discover.FAMILIES):
        assert discover.family(name) is not None
