"""Grids of images with what a network took them for, the wrong ones marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spec.plots.style import RIGHT, WRONG, figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 30
COLUMNS = 10
SIDE, TOP, COLUMN = 1.15, 0.45, 1.3  # inches: of an image, of the title, and from one image to the next
LONGEST_NAME = 12  # letters of a class's name above an image


def most_certain_mistakes(probabilities: np.ndarray, labels: np.ndarray, number: int = SHOWN) -> np.ndarray:
    """Return which examples are wrong with the highest probability, highest first, at most `number`; probabilities
    [n, classes], labels [n].

    >>> most_certain_mistakes(np.array([[0.6, 0.4], [0.9, 0.1], [0.8, 0.2]]), np.array([1, 1, 0])).tolist()
    [1, 0]
    """
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[np.argsort(-probabilities.max(axis=1)[wrong], kind="stable")][:number]


def grid(
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    probabilities: np.ndarray | None = None,
    *,
    title: str = "",
) -> Figure:
    """Return images [n, h, w, 1 or 3] in rows of ten, each with its label [n].

    With probabilities [n, classes] also with the class it is taken for, and how certainly: a cross and a frame mark the
    wrong ones.
    """
    rows = max(1, math.ceil(len(images) / COLUMNS))
    captions = 0.5 if probabilities is not None else 0.25  # inches above each image
    names = short(class_names, LONGEST_NAME)
    height = TOP + rows * (captions + SIDE)
    picture = figure(COLUMN * COLUMNS, height, layout=None)
    # Where everything lies is known: laying out a hundred axes by their contents would take seconds.
    picture.subplots_adjust(
        left=0.01, right=0.99, bottom=0.01, top=1 - (TOP + captions) / height, hspace=captions / SIDE
    )
    for index, axes in enumerate(picture.subplots(rows, COLUMNS, squeeze=False).flat):
        axes.set_xticks([])
        axes.set_yticks([])
        if index >= len(images):
            axes.set_axis_off()
            continue
        image = images[index]
        axes.imshow(_displayed(image), cmap="gray_r" if image.shape[-1] == 1 else None)
        probability = None if probabilities is None else probabilities[index]
        _caption(axes, names, int(labels[index]), probability)
    picture.suptitle(title, y=1 - 0.15 / height, va="top", fontsize=11)
    return picture


def _caption(axes: Axes, class_names: Sequence[str], label: int, probability: np.ndarray | None) -> None:
    if probability is None:
        axes.set_title(class_names[label], fontsize=8)
        return
    taken = int(probability.argmax())
    right = taken == label
    colour = RIGHT if right else WRONG
    text = f"{'✓' if right else '✗'} {class_names[taken]} {probability[taken]:.1%}"
    text += "" if right else f"\nis {class_names[label]}"
    axes.set_title(text, fontsize=7, color=colour, fontweight="normal" if right else "bold")
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1 if right else 2.5, linestyle="-" if right else (0, (3, 1)))


def _displayed(image: np.ndarray) -> np.ndarray:
    """Return an image [h, w] or [h, w, 3] of values in 0..1."""
    values = image.astype(np.float64)
    span = (values.max() - values.min()) or 1.0
    unit = (values - values.min()) / span
    return unit[..., 0] if image.shape[-1] == 1 else unit
