"""Find the one-file plugins by the names of their files.

A plugin is a module whose name does not start with an underscore and that holds one object under a fixed name, such as
`METHOD` or `FAMILY`. Adding the file is all that registers it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from baselines import Method
    from benchmarks.backends import Backend
    from benchmarks.models import Family

METHODS = "baselines"
FAMILIES = "benchmarks.models"
EXTRACTORS = "benchmarks.features"
DATASETS = "benchmarks.datasets"
BACKENDS = "benchmarks.backends"


def unknown(kind: str, value: object, allowed: Iterable[str], advice: str) -> ValueError:
    """The error for a name that is not among ``allowed``: names them, and the nearest one where there is one."""
    allowed = sorted(allowed)
    nearest = difflib.get_close_matches(str(value), allowed, n=1)
    guess = f"did you mean {nearest[0]!r}? " if nearest else ""
    return ValueError(f"unknown {kind} {value!r}: {guess}Allowed: {', '.join(allowed) or 'none'}. {advice}")


def names(package: str) -> tuple[str, ...]:
    """Names of the plugins in ``package``, sorted; only the package itself is imported, not its plugins."""
    path = importlib.import_module(package).__path__
    found = (module.name for module in pkgutil.iter_modules(path) if not module.ispkg)
    return tuple(sorted(name for name in found if not name.startswith("_")))


def find(package: str, kind: str, name: str) -> object:
    """The object that the plugin ``name`` of ``package`` holds; ``kind`` in capitals is the name it goes by.

    Raises ValueError when there is no such plugin (naming the nearest one) or when its module lacks the object.
    """
    if name not in names(package):
        folder = package.replace(".", "/")
        raise unknown(kind, name, names(package), f"A file {folder}/{name}.py would add it.")
    module = importlib.import_module(f"{package}.{name}")
    if not hasattr(module, kind.upper()):
        raise ValueError(f"{module.__name__} has no {kind.upper()}: a {kind} file must define it")
    return getattr(module, kind.upper())


def file(package: str, name: str) -> Path:
    """The source file of the plugin ``name`` of ``package``. Raises ValueError as `find` does."""
    if name not in names(package):
        find(package, "plugin", name)
    return Path(inspect.getfile(importlib.import_module(f"{package}.{name}")))


def text(package: str, name: str) -> str:
    """The docstring of the plugin ``name`` of ``package``."""
    return inspect.getdoc(importlib.import_module(f"{package}.{name}")) or ""


def method(name: str) -> Method:
    """The quantisation method of `baselines/<name>.py`."""
    return cast("Method", find(METHODS, "method", name))


def family(name: str) -> Family:
    """The model family of `benchmarks/models/<name>.py`."""
    return cast("Family", find(FAMILIES, "family", name))


def backend(name: str) -> Backend:
    """What computes a quantised network, of `benchmarks/backends/<name>.py`."""
    return cast("Backend", find(BACKENDS, "backend", name))
