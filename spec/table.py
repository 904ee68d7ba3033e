"""A table on the screen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = ()) -> None:
    """Print `rows` under `headings`, as wide as they are; the columns named in `right` are set flush right."""
    lines = [headings, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(headings, line, widths, strict=True)
        text = "  ".join(f"{cell:>{width}}" if name in right else f"{cell:<{width}}" for name, cell, width in cells)
        print(text.rstrip())


def printable(text: str) -> str:
    """Return `text`, escaped if it holds what would control the terminal, or what cannot be encoded.

    >>> printable("tür.png"), printable("a\\x1b[2J")
    ('tür.png', 'a\\\\x1b[2J')
    """
    return text if text.isprintable() else ascii(text)[1:-1]
