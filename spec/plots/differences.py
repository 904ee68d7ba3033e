"""How far two runs are apart, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spec.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def differences_picture(differences: Mapping[int, float], *, bound: float, title: str) -> Figure:
    """Return the largest difference by step, on a scale of powers of ten, under the `bound` that it must keep."""
    figure = style.panels(2)
    axes = figure.subplots()
    axes.semilogy(list(differences), list(differences.values()), label="largest difference", **style.line(0))
    axes.axhline(bound, label="bound", **style.line(1, marker=None))
    axes.set_xlabel("step")
    axes.set_ylabel("largest difference of any weight")
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    style.titled(figure, title)
    return figure
