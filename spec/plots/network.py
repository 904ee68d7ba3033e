"""A drawing of a network, from its input on the left to its outputs on the right."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from spec.layers import Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_UNITS = 12  # drawn of a column
COLUMN, HEIGHT = 1.5, 3.4  # inches: from one column to the next, and of the tallest
GAP, MARGIN, LINE_HEIGHT = 0.25, 0.25, 0.19  # inches: above the text, around all, of a line of text
RADIUS = 0.09  # inches, of a unit
THINNEST, THICKEST = 0.1, 0.5  # inches: of the blocks with the fewest and the most channels
SLANT = (0.16, 0.09)  # inches to the right and upwards, of what is an inch deep
FILL = {"input": "#cccccc", "conv": "#56B4E9", "linear": "#E69F00", "output": "#009E73"}  # Okabe and Ito, and grey
SHADES = (1.0, 0.75, 0.88)  # of a block's front, side and top
EDGE, FAINT = "#333333", "#999999"


class Stage(NamedTuple):
    """One column: the input, or a layer with weights and those without that follow it. `shape` is what they end with,
    [units] or [height, width, channels]; `lines` are written beneath."""

    role: str
    shape: tuple[int, ...]
    lines: tuple[str, ...]


class Sides(NamedTuple):
    """Where a column begins and ends, and the heights of its units, if it is drawn as units."""

    left: float
    right: float
    units: tuple[float, ...] | None


def network(layers: Sequence[Layer]) -> Figure:
    """Return a figure of the network that `spec.layers.layers` lists.

    A vector is a column of units, each joined to all of the column before it; an image is a block as high and as deep
    as it is, and the thicker the more channels it has. Sizes and names stand beneath.
    """
    from matplotlib.figure import Figure

    columns = stages(layers)
    below = GAP + LINE_HEIGHT * (1 + max(len(stage.lines) for stage in columns))
    width, height = COLUMN * len(columns), HEIGHT + below + 2 * MARGIN
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(-HEIGHT / 2 - below - MARGIN, HEIGHT / 2 + MARGIN))
    axes.set_axis_off()
    largest = _largest(columns)
    sides = [_draw(axes, COLUMN * (index + 0.5), stage, largest) for index, stage in enumerate(columns)]
    for left, right in itertools.pairwise(sides):
        _join(axes, left, right)
    for index, stage in enumerate(columns):
        text = {"ha": "center", "va": "top", "linespacing": 1.3}
        x, y = COLUMN * (index + 0.5), -HEIGHT / 2 - GAP
        axes.text(x, y, "x".join(map(str, stage.shape)), fontsize=10, fontweight="bold", **text)
        axes.text(x, y - 1.1 * LINE_HEIGHT, "\n".join(stage.lines), fontsize=9, **text)
    return figure


def stages(layers: Sequence[Layer]) -> tuple[Stage, ...]:
    """Return the columns of the drawing; an image that is flattened before any convolution is a column of units."""
    found: list[Stage] = []
    for layer in layers:
        if layer.kind == "input" or layer.flops is not None:
            role, *window = layer.kind.split()
            found.append(Stage(role, layer.shape, (" ".join([layer.name, *window]),)))
        elif layer.kind != "flatten":
            found[-1] = found[-1]._replace(shape=layer.shape, lines=(*found[-1].lines, layer.kind))
        elif len(found[-1].shape) > 1:
            shape = layer.shape if len(found) == 1 else found[-1].shape
            of = "x".join(map(str, found[-1].shape))
            line = f"{of} flattened" if len(found) == 1 else f"flatten: {layer.shape[0]}"
            found[-1] = found[-1]._replace(shape=shape, lines=(*found[-1].lines, line))
    return (*found[:-1], found[-1]._replace(role="output"))


def _largest(columns: Sequence[Stage]) -> tuple[int, int]:
    """Return the longest side of any block, and the most channels; 1 where there is none."""
    blocks = [stage.shape for stage in columns if len(stage.shape) == 3]
    return max((max(shape[:2]) for shape in blocks), default=1), max((shape[2] for shape in blocks), default=1)


def _draw(axes: Axes, x: float, stage: Stage, largest: tuple[int, int]) -> Sides:
    return _block(axes, x, stage, *largest) if len(stage.shape) == 3 else _units(axes, x, stage)


def _units(axes: Axes, x: float, stage: Stage) -> Sides:
    """Draw a column of units around `x`; if there are too many, the first and the last, and dots for the others."""
    from matplotlib.patches import Circle

    count = math.prod(stage.shape)
    places = count if count <= MOST_UNITS else MOST_UNITS + 1  # with one for the dots
    spacing = HEIGHT / (MOST_UNITS + 1)
    heights = [spacing * ((places - 1) / 2 - place) for place in range(places)]
    if count > MOST_UNITS:
        middle = heights.pop(places // 2)
        axes.plot([x] * 3, [middle - 0.07, middle, middle + 0.07], ".", color=EDGE, markersize=3, zorder=3)
    for y in heights:
        axes.add_patch(Circle((x, y), RADIUS, facecolor=FILL[stage.role], edgecolor=EDGE, linewidth=0.8, zorder=3))
    return Sides(x - RADIUS, x + RADIUS, tuple(heights))


def _block(axes: Axes, x: float, stage: Stage, longest: int, most: int) -> Sides:
    """Draw a block around `x`: its front is as high as the image and as wide as its channels, the image's width goes
    to the back."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Polygon

    height, deep = (HEIGHT * 0.9 * side / longest for side in stage.shape[:2])
    thick = THINNEST + (THICKEST - THINNEST) * math.log(stage.shape[2]) / (math.log(most) or 1)
    back, up = deep * SLANT[0], deep * SLANT[1]
    left, right, low, high = x - (thick + back) / 2, x + (thick - back) / 2, -(height + up) / 2, (height - up) / 2
    front = [(left, low), (right, low), (right, high), (left, high)]
    side = [(right, low), (right + back, low + up), (right + back, high + up), (right, high)]
    top = [(left, high), (right, high), (right + back, high + up), (left + back, high + up)]
    for corners, shade in zip((front, side, top), SHADES, strict=True):
        colour = [shade * part for part in to_rgb(FILL[stage.role])]
        axes.add_patch(Polygon(corners, facecolor=colour, edgecolor=EDGE, linewidth=0.8, joinstyle="round", zorder=3))
    return Sides(left, right + back, None)


def _join(axes: Axes, left: Sides, right: Sides) -> None:
    """Join two columns: every unit with every unit, or by an arrow where one of them is a block."""
    from matplotlib.collections import LineCollection

    if left.units and right.units:
        ends = itertools.product(left.units, right.units)
        lines = [[(left.right, start), (right.left, end)] for start, end in ends]
        axes.add_collection(LineCollection(lines, colors=FAINT, linewidths=0.35, zorder=1))
        return
    style = {"arrowstyle": "-|>", "color": EDGE, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (right.left - 0.08, 0), (left.right + 0.08, 0), arrowprops=style)
