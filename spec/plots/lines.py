"""How the lessons' lines look: Okabe and Ito's colours, which all eyes tell apart, each with a dash and a marker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spec.errors import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
INCHES = (4.4, 3.8)  # of one panel


def line(index: int, **changed: Any) -> dict[str, Any]:
    """Return matplotlib's keywords for the line number `index`, from 0; lines repeat after five."""
    which = index % len(COLOURS)
    return {"color": COLOURS[which], "linestyle": DASHES[which], "marker": MARKERS[which], "markersize": 5} | changed


def panels(columns: int, rows: int = 1) -> Figure:
    """Return an empty figure with room for so many panels. Raises UserError where matplotlib is not installed."""
    require("matplotlib", extra="plot")
    from matplotlib.figure import Figure

    return Figure(figsize=(INCHES[0] * columns, INCHES[1] * rows), layout="constrained")
