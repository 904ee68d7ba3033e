"""What all pictures share: colours that the colour-blind tell apart, lines that differ in grey print too, and files."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spec.errors import UserError, require, shown
from spec.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008), without its yellow, which is too light for a line.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
RIGHT, WRONG = BLUE, VERMILION
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
GREY = "#666666"
PANEL = (4.4, 3.8)  # inches
DPI = 150
LETTERS = 11  # of a title, to the inch
LONGEST_NAME = 24  # letters of a class's name; more would take the picture's place
FORMATS = ("png", "svg")
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "lockstep", "font.size": 10, "axes.titlesize": 11}


def look(index: int) -> dict[str, str]:
    """Return the colour and the marker of the line of that number; two of the first 49 never share both."""
    marker = (index + index // len(PALETTE)) % len(MARKERS)
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[marker]}


def line(index: int, **changed: Any) -> dict[str, Any]:
    """Return matplotlib's keywords for the line of that number: a colour, a dash and a marker; they repeat after five,
    but for what is `changed`."""
    which = index % len(DASHES)
    look = {"color": PALETTE[which], "linestyle": DASHES[which], "marker": MARKERS[which], "markersize": 5}
    return look | changed


def panels(columns: int, rows: int = 1) -> Figure:
    """Return an empty figure with room for so many panels. Raises UserError where matplotlib is not installed."""
    require("matplotlib", extra="plot")
    return figure(PANEL[0] * columns, PANEL[1] * rows)


def figure(width: float, height: float, *, layout: str | None = "constrained") -> Figure:
    """Return an empty figure of that size in inches; it is in no window and in no list of open ones."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def titled(picture: Figure, title: str) -> None:
    """Give a figure its title, on as many lines as its width asks for."""
    width = int(LETTERS * picture.get_size_inches()[0])
    picture.suptitle(textwrap.fill(title, width), fontsize=SETTINGS["axes.titlesize"])


def short(names: Sequence[str], most: int = LONGEST_NAME) -> list[str]:
    """Return names as a picture has room for them: the ends of a long one.

    >>> short(["coat", "a very long name of a class of examples"], most=20)
    ['coat', 'a very lon...xamples']
    """
    return [shown(name, most=most) for name in names]


def save(picture: Figure, folder: Path, name: str, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write a figure to `folder`, made if need be, as NAME.png and NAME.svg, each whole or not at all; return both.

    The same figure gives the same bytes: no date is in them. Raises UserError where the disk refuses.
    """
    import matplotlib
    from matplotlib.text import Text

    for text in picture.findobj(Text):
        text.set_parse_math(False)  # a dollar in a name is a dollar
    written = []
    for kind in formats:
        content, path = io.BytesIO(), folder / f"{name}.{kind}"
        with matplotlib.rc_context(SETTINGS):
            picture.savefig(content, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content.getvalue())
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); name another place with --out") from None
        written.append(path)
    return written
