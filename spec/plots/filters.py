"""The first layer's weights: as images where it looks at images, as a table of colours where it looks at features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spec.params import Leaf
from spec.plots.style import figure, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 64
COLUMNS = 16
GAP = "0.8"  # grey: white is a weight of 0
DIVERGING = "RdBu"  # red below 0, blue above, white at 0: told apart by the colour-blind


def tiles(leaf: Leaf, weight: np.ndarray) -> np.ndarray | None:
    """Return what each unit of the first layer has for each pixel, [units, h, w, channels], of its canonical weight
    (torch's layout: [units, channels * h * w], or [units, channels, h, w]); None where the input is no image."""
    if weight.ndim == 4:
        return np.moveaxis(weight, 1, -1)
    if not leaf.flattened:
        return None
    height, width, channels = leaf.flattened
    return np.moveaxis(weight.reshape(-1, channels, height, width), 1, -1)


def first_layer(leaves: Sequence[Leaf], state: Mapping[str, np.ndarray], *, title: str = "") -> Figure:
    """Return the first weight of a canonical state drawn; of more than 64 units the first."""
    leaf = next(leaf for leaf in leaves if leaf.role == "weight")
    weight = np.asarray(state[leaf.name], np.float64)
    shown = tiles(leaf, weight)
    return _table(weight, title) if shown is None else _images(shown, title)


def mosaic(images: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """Return images [n, h, w] as one, row by row, a line of nan between them and where there are too few.

    >>> mosaic(np.ones((3, 1, 1)), columns=2).tolist()
    [[1.0, nan, 1.0], [nan, nan, nan], [1.0, nan, nan]]
    """
    number, height, width = images.shape
    columns = min(columns, number)
    rows = math.ceil(number / columns)
    whole = np.full((rows * (height + 1), columns * (width + 1)), np.nan)
    for index, image in enumerate(images):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        whole[top : top + height, left : left + width] = image
    return whole[:-1, :-1]


def _images(shown: np.ndarray, title: str) -> Figure:
    """Return each unit's weights as one image, the mean over channels where there are several; one scale for all."""
    from matplotlib import colormaps

    whole = mosaic(shown[:SHOWN].mean(axis=-1))
    limit = np.nanmax(np.abs(whole)) or 1.0
    height, width = whole.shape
    picture = figure(11, 1.2 + 10 * height / width, layout="compressed")
    axes = picture.subplots()
    axes.set_axis_off()
    drawn = axes.imshow(
        whole, cmap=colormaps[DIVERGING].with_extremes(bad=GAP), vmin=-limit, vmax=limit, interpolation="nearest"
    )
    picture.colorbar(drawn, ax=axes, label="weight")
    some = f" (the first {SHOWN} of {len(shown)} units)" if len(shown) > SHOWN else ""
    titled(picture, title + some)
    return picture


def _table(weight: np.ndarray, title: str) -> Figure:
    """Return weights [units, features] as a table of colours."""
    limit = np.abs(weight).max() or 1.0
    picture = figure(8, 4)
    axes = picture.subplots()
    drawn = axes.imshow(weight, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set_xlabel("feature")
    axes.set_ylabel("unit")
    picture.colorbar(drawn, ax=axes, label="weight")
    titled(picture, title)
    return picture
