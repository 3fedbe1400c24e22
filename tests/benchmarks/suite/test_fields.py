from dataclasses import dataclass
from typing import Literal

import pytest

from benchmarks.suite.fields import read


@dataclass(frozen=True)
class Part:
    size: float = 1.0


@dataclass(frozen=True)
class Whole:
    name: str
    mode: Literal["shared", "temporal"] = "shared"
    sizes: tuple[int, ...] = ()
    part: Part | None = None
    extra: object = None


def test_values_are_read_by_their_types():
    assert read(Whole, {"name": "a"}, "whole") == Whole("a")
    found = read(Whole, {"name": "a", "mode": "temporal", "sizes": [1, 2], "part": {"size": 2}, "extra": [1]}, "whole")
    assert found == Whole("a", "temporal", (1, 2), Part(2.0), [1])
    assert read(Whole, {"name": "a", "part": None}, "whole") == Whole("a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "temporl"}, "unknown whole.mode 'temporl': did you mean 'temporal'"),
        ({"sizes": 1}, "whole.sizes is 1: it must be a list"),
        ({"sizes": [1, "2"]}, r"whole.sizes\[1\] is '2': it must be a whole number"),
        ({"part": {"size": float("nan")}}, "whole.part.size is nan: it must be a finite number"),
        ({"part": {"sise": 1}}, "unknown key in whole.part 'sise': did you mean 'size'"),
        ({"name": None}, "whole.name is None: it must be a text"),
    ],
)
def test_other_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read(Whole, {"name": "a"} | change, "whole")
