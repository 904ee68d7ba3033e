"""Pictures of gradients right and wrong: their entries side by side, and what training with each comes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from spec.plots.style import line, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def losses_picture(losses: Mapping[str, np.ndarray]) -> Figure:
    """Return each run's mean loss [epochs + 1] against the epoch, by name, on a log scale."""
    figure = panels(2)
    axes = figure.subplots()
    for index, (name, values) in enumerate(losses.items()):
        axes.plot(values, **line(index, label=name, markevery=max(1, len(values) // 10)))
    axes.set(xlabel="epoch", ylabel="mean loss over the table, nats", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def entries_picture(witness: np.ndarray, gradients: Mapping[str, np.ndarray]) -> Figure:
    """Return every entry of each gradient against the same entry of `witness`: what is right lies on the diagonal."""
    figure = panels(len(gradients))
    for index, (axes, (name, grads)) in enumerate(
        zip(figure.subplots(1, len(gradients), squeeze=False)[0], gradients.items(), strict=True)
    ):
        ends = [witness.min(), witness.max()]
        axes.plot(ends, ends, color="0.6", linewidth=1)
        axes.plot(witness.ravel(), grads.ravel(), **line(index, linestyle="none", markersize=3, alpha=0.6))
        axes.set(title=name, xlabel="by numerical differentiation", ylabel="as derived")
        axes.locator_params(nbins=5)
        axes.grid(alpha=0.3)
    return figure
