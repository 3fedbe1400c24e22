"""Read plain mappings (from YAML or JSON) into frozen dataclasses, strictly.

Every key must be a field and every field without a default must be there; values must have the annotated type. Nothing
is converted except a whole number where a float is asked for, and lists to tuples.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import TYPE_CHECKING, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from benchmarks.suite.discover import unknown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

_WORDS: dict[object, str] = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    dict: "a mapping",
}


def read(cls: type[T], mapping: object, where: str) -> T:
    """An instance of the dataclass ``cls`` from ``mapping``; ``where`` names the mapping in errors.

    Raises ValueError for an unknown key (with the nearest field), a missing field, or a value of another type.
    """
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} is {mapping!r}: it must be {_WORDS[dict]} with the keys of {cls.__name__}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in mapping:
        if key not in fields:
            raise unknown(f"key in {where}", key, fields, "Remove or rename it.")
    missing = [
        name
        for name, field in fields.items()
        if name not in mapping and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: add what is missing")
    return cls(**{key: _value(value, hints[key], f"{where}.{key}") for key, value in mapping.items()})


def _value(value: object, hint: object, where: str) -> object:
    if hint is object:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return read(hint, value, where)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise unknown(where, value, get_args(hint), "Choose one of them.")
        return value
    if get_origin(hint) in (types.UnionType, Union):
        (inner,) = (option for option in get_args(hint) if option is not types.NoneType)
        return None if value is None else _value(value, inner, where)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}: it must be a list")
        return tuple(_value(item, get_args(hint)[0], f"{where}[{index}]") for index, item in enumerate(value))
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}: it must be {_WORDS[dict]}")
        return {key: _value(item, get_args(hint)[1], f"{where}.{key}") for key, item in value.items()}
    return _scalar(value, hint, where)


def _scalar(value: object, hint: object, where: str) -> object:
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{where} is {value!r}: it must be {_WORDS[hint]}")
    return value
