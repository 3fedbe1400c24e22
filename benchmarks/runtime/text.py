"""Text files that people bring, such as prompts and settings: read right whatever editor wrote them, or refused."""

from __future__ import annotations

import codecs
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

# A byte order mark at the beginning of a file -> its encoding.
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def read_text(path: Path) -> str:
    r"""The text of a file in UTF-8, or in UTF-16 with a byte order mark; lines end in ``\n`` whatever ended them.

    Raises ValueError, naming the file and the line, for any other encoding.
    """
    data = path.read_bytes()
    mark, encoding = next(((mark, name) for mark, name in MARKS.items() if data.startswith(mark)), (b"", "utf-8"))
    data = data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        raise ValueError(f"{path} is not UTF-8 (line {line}): save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{path} holds zero bytes, as UTF-16 without a byte order mark does: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of a file, without what ends them and without blank lines at its end. Raises as `read_text`."""
    lines = read_text(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one a line. Raises ValueError for a line that is none, or half-written."""
    objects = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            objects.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}: line {number} is no JSON, or half-written: remove it") from None
    return objects


def read_yaml(path: Path) -> object:
    """What a YAML file holds. Raises ValueError, in one line, for one that is no YAML, or gives a key twice."""
    try:
        return yaml.load(read_text(path), _Loader)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        advice = "; indent with spaces, not with tabs" if r"'\t'" in problem else ""
        raise ValueError(f"{path} is not valid YAML: {problem}{advice}") from None


class _Loader(yaml.SafeLoader):
    """The safe loader, for which a key that is given twice is an error, and not what its last value says."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable) and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
