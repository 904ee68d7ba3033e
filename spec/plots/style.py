"""What all pictures share: colours that the colour-blind tell apart, lines that differ in grey print too, and files."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
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
FONT = "DejaVu Sans"  # matplotlib's own; behind it, for names in Chinese, those of these that are installed
CHINESE = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "SimHei")
MISSING = re.compile(r"Glyph (\d+) .* missing from font")
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

    The same figure gives the same bytes: no date is in them. Letters that no font here has are said, and left to the
    SVG. Raises UserError where the disk refuses.
    """
    from matplotlib.text import Text

    fonts = _fonts()
    for text in picture.findobj(Text):
        text.set_parse_math(False)  # a dollar in a name is a dollar
        text.set_fontfamily(fonts)
    written, missing = [], set()
    for kind in formats:
        path = folder / f"{name}.{kind}"
        content, without_font = _rendered(picture, kind)
        missing |= without_font
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); name another place with --out") from None
        written.append(path)
    if missing:
        letters = " ".join(sorted(missing))
        print(f"{name}: no font here has {letters}; install one (Noto Sans CJK), or open the SVG elsewhere")
    return written


def _rendered(picture: Figure, kind: str) -> tuple[bytes, set[str]]:
    """Return a file's content, and the letters that no font has."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings(record=True) as warned:
        warnings.filterwarnings("always", message=MISSING.pattern)
        picture.savefig(content, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
    found = [MISSING.search(str(each.message)) for each in warned]
    for each, missing in zip(warned, found, strict=True):
        if not missing:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return content.getvalue(), {chr(int(missing[1])) for missing in found if missing}


def _fonts() -> list[str]:
    """Return matplotlib's own font, and behind it those for Chinese that are installed."""
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    return [FONT, *(name for name in CHINESE if name in there)]
