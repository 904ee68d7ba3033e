"""Two columns of source code for a notebook, read from the running packages, so that what is shown is what runs."""

from __future__ import annotations

import html
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence

STYLE = "text-align: left; vertical-align: top; font-size: 80%"


def side_by_side(columns: Mapping[str, Sequence[Callable]]) -> str:
    """Return an HTML table with a column for each title: the source of its functions or classes, one after
    another, each under the module that it is from. Raises OSError where a source cannot be read."""
    heads = "".join(f'<th style="{STYLE}">{html.escape(title)}</th>' for title in columns)
    cells = "".join(f'<td style="{STYLE}">{"".join(map(_listed, shown))}</td>' for shown in columns.values())
    return f"<table><tr>{heads}</tr><tr>{cells}</tr></table>"


def _listed(shown: Callable) -> str:
    """Return where a function or class is from, and its source."""
    source = textwrap.dedent(inspect.getsource(shown)).rstrip()
    return f"<b>{html.escape(shown.__module__)}</b><pre>{html.escape(source)}</pre>"
