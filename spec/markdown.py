"""Tables of the README, from the results that are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, without a line's end after its last row."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *rows])
