"""What a network takes for what: the confusion matrix, and the figures of each class that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spec.plots.style import BLUE, GREEN, MARKERS, VERMILION, figure, short, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_WRITTEN = 20  # classes; the numbers of more would not be read
MOST_NAMED = 40  # classes; the names of more would lie over one another
NARROWEST = 5.0  # inches
HEADINGS = ("class", "examples", "right", "precision", "recall", "F1")


def counts(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Return how many examples of class i were taken for class j, int64 [classes, classes]; arrays [n] of classes.

    >>> counts(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    return np.bincount(num_classes * labels.astype(np.int64) + predictions, minlength=num_classes**2).reshape(
        num_classes, num_classes
    )


def rows_normalised(matrix: np.ndarray) -> np.ndarray:
    """Return the share of each class's examples that went to each class, float64; nan where a class has none.

    >>> rows_normalised(np.array([[1, 3], [0, 0]])).tolist()
    [[0.25, 0.75], [nan, nan]]
    """
    examples = matrix.sum(axis=1, keepdims=True).astype(np.float64)
    return matrix / np.where(examples > 0, examples, np.nan)


def confusion(matrix: np.ndarray, class_names: Sequence[str], *, title: str = "") -> Figure:
    """Return the matrix drawn, a row a true class, per cent of its examples in the cells."""
    shares, size = rows_normalised(matrix), len(class_names)
    side = min(size, MOST_WRITTEN)
    picture = figure(max(NARROWEST, 2.8 + 0.55 * side), 2.3 + 0.5 * side, layout="compressed")
    axes = picture.subplots()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    named = range(0, size, math.ceil(size / MOST_NAMED))
    names, letters = short([class_names[index] for index in named]), 10 if size <= MOST_WRITTEN else 8
    axes.set_xticks(named, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=letters)
    axes.set_yticks(named, names, fontsize=letters)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if size <= MOST_WRITTEN:
        for (row, column), share in np.ndenumerate(shares):
            text = "" if np.isnan(share) or matrix[row, column] == 0 else f"{100 * share:.1f}"
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8, in_layout=False)
    picture.colorbar(image, ax=axes, label="% of the true class")
    titled(picture, title)
    return picture


def by_class(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Return `examples` and `right` of each class, int64, and its `precision`, `recall` and `F1`, float64; nan where
    nothing was there to be divided by."""
    right, examples, taken = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore"):
        precision, recall, f1 = right / taken, right / examples, 2 * right / (examples + taken)
    return {"examples": examples, "right": right, "precision": precision, "recall": recall, "F1": f1}


def rows(matrix: np.ndarray, class_names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the table of the classes under HEADINGS, as text."""
    found = by_class(matrix)

    def row(index: int, name: str) -> tuple[str, ...]:
        shares = [found[of][index] for of in HEADINGS[3:]]
        said = ["-" if np.isnan(share) else f"{share:.4f}" for share in shares]
        return name, f"{found['examples'][index]:,}", f"{found['right'][index]:,}", *said

    return [row(index, name) for index, name in enumerate(class_names)]


def classes(matrix: np.ndarray, class_names: Sequence[str], *, title: str = "") -> Figure:
    """Return precision, recall and F1 of each class as points on a line, the class with the lowest F1 at the top; of
    many classes the worst."""
    found = by_class(matrix)
    order = np.argsort(np.nan_to_num(found["F1"], nan=-1), kind="stable")[:MOST_NAMED][::-1]
    picture = figure(7.5, 1.7 + 0.32 * len(order))
    axes = picture.subplots()
    axes.hlines(range(len(order)), found["precision"][order], found["recall"][order], color="0.7")
    for of, colour, marker in zip(HEADINGS[3:], (BLUE, VERMILION, GREEN), MARKERS, strict=False):
        axes.plot(found[of][order], range(len(order)), marker, color=colour, label=of)
    axes.set_yticks(range(len(order)), short([class_names[index] for index in order]))
    axes.set_ylim(-0.5, len(order) - 0.5)
    axes.grid(axis="x", alpha=0.3)
    some = f" (the worst {MOST_NAMED} of {len(class_names)} classes)" if len(class_names) > MOST_NAMED else ""
    titled(picture, title + some)
    picture.legend(loc="outside lower center", ncols=3, frameon=False)
    return picture
