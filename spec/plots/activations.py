"""Pictures of the activations and their derivatives, and of gradients that fade on their way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from spec import oracle
from spec.lessons.activations import ACTIVATIONS, derivative_products, softmax_jacobian
from spec.plots.style import line, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OTHERS = (2.0, 3.0, 4.0)  # logits of the lesson's softmax([1, 2, 3, 4]) beside the one that moves


def activations_picture() -> Figure:
    """Return sigmoid, tanh, relu and leaky relu with their derivatives, and softmax's first probability with its own.

    Softmax is one of several logits: the first moves, the others are the lesson's 2, 3 and 4.
    """
    figure = panels(3, 2)
    grid = figure.subplots(2, 3).ravel()
    x = np.linspace(-5, 5, 401)
    for axes, (name, activation) in zip(grid, ACTIVATIONS.items(), strict=False):
        _function_and_derivative(axes, x, activation.value(x), activation.derivative(x))
        axes.set(title=name, xlabel="z", ylim=(-1.2, 2.2))
    z = np.linspace(-2, 9, 401)
    moved = [np.array([first, *OTHERS]) for first in z]
    first, slope = [oracle.softmax(logits)[0] for logits in moved], [softmax_jacobian(logits)[0, 0] for logits in moved]
    _function_and_derivative(grid[4], z, np.array(first), np.array(slope))
    grid[4].set(title="softmax([z, 2, 3, 4]), the first of four", xlabel="z", ylim=(-0.05, 1.05))
    grid[5].axis("off")
    grid[5].legend(*grid[4].get_legend_handles_labels(), loc="center", frameon=False, fontsize=12)
    return figure


def vanishing_picture(measured: Mapping[str, np.ndarray]) -> Figure:
    """Return the most that derivatives multiply to by depth, and the `measured` gradient sizes [layers] by name."""
    figure = panels(2)
    bound, sizes = figure.subplots(1, 2)
    depths = np.arange(max(map(len, measured.values())))
    for index, name in enumerate(measured):
        bound.plot(depths, derivative_products(name, depths), **line(index, label=name))
        sizes.plot(np.arange(1, len(measured[name]) + 1), measured[name], **line(index, label=name))
    bound.set(xlabel="layers to go back through", ylabel="largest product of the derivatives", title="at most")
    sizes.set(xlabel="layer, the first is furthest from the loss", ylabel="root mean square of dL/dW", title="measured")
    for axes in (bound, sizes):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    return figure


def _function_and_derivative(axes: Axes, x: np.ndarray, value: np.ndarray, derivative: np.ndarray) -> None:
    axes.plot(x, value, **line(0, label="function", marker=""))
    axes.plot(x, derivative, **line(1, label="derivative", marker=""))
    axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axes.grid(alpha=0.3)
