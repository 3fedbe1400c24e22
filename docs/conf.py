"""Sphinx: the pages of this folder, and one of the API that is made from the docstrings. `nox -s docs` builds them."""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import tfmq  # noqa: E402

project = "tfmq-bench"
author = "the contributors of tfmq-bench"
release = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
myst_heading_anchors = 3

# `Pass` in a docstring is a link where there is such a name, and code where there is none.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Fields that share a line of an `Attributes:` section stay on it.
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_numpy_docstring = False

API = """
API
===

What ``import tfmq`` gives. A pass is shown with its settings; all passes have the methods of `tfmq.Pass`.

.. currentmodule:: tfmq
"""


def api(names: Iterable[str]) -> str:
    """The page of the API: functions, passes, and all other classes, each by name."""
    found = {name: getattr(tfmq, name) for name in sorted(names)}
    functions = [name for name, part in found.items() if not inspect.isclass(part)]
    classes = [name for name, part in found.items() if inspect.isclass(part)]
    passes = [name for name in classes if issubclass(found[name], tfmq.Pass) and name != "Pass"]
    others = [name for name in classes if name not in passes]
    sections = (
        ("Functions", [f".. autofunction:: {name}" for name in functions]),
        ("Passes", [f".. autoclass:: {name}" for name in passes]),
        ("Classes", [f".. autoclass:: {name}\n   :members:" for name in others]),
    )
    return "\n\n".join([API.strip(), *(f"{title}\n{'-' * len(title)}\n\n" + "\n\n".join(e) for title, e in sections)])


(HERE / "api.rst").write_text(api(tfmq.__all__) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Called by Sphinx. In docstrings, |w - w_hat| is a magnitude; to reStructuredText, a substitution."""
    app.connect("autodoc-process-docstring", escape_bars)


def escape_bars(app: Sphinx, what: str, name: str, part: object, options: object, lines: list[str]) -> None:
    """Escape vertical bars outside literals, in place."""
    lines[:] = [re.sub(r"(``.*?``)|\|", lambda found: found.group(1) or r"\|", line) for line in lines]
