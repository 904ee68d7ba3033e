"""Pictures of gradient descent: the surface of two weights, paths over its contours, the noise of mini-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spec.errors import require
from spec.lessons.descent import MINIMUM, surface
from spec.plots.style import line, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDE = (-1.5, 3.5)  # of the square of weights that is drawn
LEVELS = (0.25, 1, 4, 10, 20, 40, 80, 150, 250)


def grid(points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return w1, w2 and the surface over the square that is drawn, each [points, points]."""
    first, second = np.meshgrid(np.linspace(*SIDE, points), np.linspace(*SIDE, points))
    return first, second, surface(np.stack([first, second], axis=-1))


def turnable_surface(points: int = 61) -> Any:
    """Return the surface as a plotly figure, which turns under the mouse. Raises UserError where plotly is missing."""
    require("plotly", extra="notebooks")
    from plotly.graph_objects import Figure, Scatter3d, Surface

    first, second, height = grid(points)
    figure = Figure([Surface(x=first, y=second, z=height, colorscale="Cividis", colorbar={"title": "loss"})])
    best = {"x": MINIMUM[:1], "y": MINIMUM[1:], "z": [0.0], "mode": "markers+text", "textposition": "bottom center"}
    figure.add_trace(Scatter3d(**best, text=["minimum 0 at (1, 1)"], marker={"color": "#D55E00", "size": 5}))
    axes = {
        "xaxis": {"title": {"text": "w1"}},
        "yaxis": {"title": {"text": "w2"}},
        "zaxis": {"title": {"text": "loss"}},
    }
    figure.update_layout(scene=axes, height=460, margin={"l": 0, "r": 0, "t": 0, "b": 0}, showlegend=False)
    return figure


def surface_picture() -> Figure:
    """Return the same surface still: from the side, and from above as contours with the minimum."""
    figure = panels(2)
    side = figure.add_subplot(1, 2, 1, projection="3d")
    side.plot_surface(*grid(41), cmap="cividis", rcount=41, ccount=41)
    side.view_init(elev=28, azim=-130)
    side.set(xlabel="w1", ylabel="w2", zlabel="loss")
    above = figure.add_subplot(1, 2, 2)
    contours(above)
    above.annotate("0 at (1, 1)", MINIMUM, (1.5, 2.0), arrowprops={"arrowstyle": "->"})
    above.set_title("the same from above")
    return figure


def contours(axes: Axes) -> None:
    """Draw lines of equal loss, each with its value, and a cross at the minimum."""
    drawn = axes.contour(*grid(201), levels=LEVELS, colors="0.6", linewidths=0.8)
    axes.clabel(drawn, fontsize=7, fmt="%g")
    axes.plot(*MINIMUM, marker="x", markersize=9, markeredgewidth=2, color="black", linestyle="none")
    axes.set(xlim=SIDE, ylim=SIDE, xlabel="w1", ylabel="w2", aspect="equal")


def until_it_leaves(path: np.ndarray) -> np.ndarray:
    """Return `path` [n, 2] up to its first point outside of what is drawn, that one included."""
    outside = np.any((path < SIDE[0]) | (path > SIDE[1]), axis=1)
    return path[: outside.argmax() + 1] if outside.any() else path


def paths_picture(rows: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Return paths [steps + 1, 2] over the contours, a panel each, under their titles; `rows` maps a row's name to its
    paths. A path ends where it leaves the picture."""
    columns = max(len(row) for row in rows.values())
    figure = panels(columns, len(rows))
    all_axes = figure.subplots(len(rows), columns, squeeze=False)
    for index, (name, row) in enumerate(rows.items()):
        for axes, (title, path) in zip(all_axes[index], row.items(), strict=True):
            contours(axes)
            axes.plot(*until_it_leaves(path).T, **line(index, linewidth=1.2, markersize=3.5))
            axes.plot(*path[0], marker="*", markersize=13, color="black", linestyle="none")
            axes.set_title(f"{name}: {title}", fontsize=10)
    return figure


def losses_picture(rows: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Return the surface's height along the same paths against the step, on a log scale, a panel each row."""
    figure = panels(len(rows))
    for axes, (name, row) in zip(
        figure.subplots(1, len(rows), sharey=True, squeeze=False)[0], rows.items(), strict=True
    ):
        for index, (title, path) in enumerate(row.items()):
            heights = np.maximum(surface(path), 1e-30)
            axes.plot(heights, **line(index, label=title.split(",")[0], markevery=max(1, len(path) // 8)))
        axes.set(title=name, xlabel="step", yscale="log", ylim=(1e-6, 1e6))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("loss")
    return figure


def noise_picture(
    batch_sizes: Sequence[int], measured: Sequence[float], expected: Sequence[float], seconds: Sequence[float]
) -> Figure:
    """Return the gradient's standard deviation, measured and expected, and the seconds a step, against batch size."""
    figure = panels(2)
    noise, cost = figure.subplots(1, 2)
    noise.plot(batch_sizes, measured, **line(0, label="measured", linestyle="none", markersize=8))
    noise.plot(batch_sizes, expected, **line(1, label="expected", marker=""))
    noise.set(ylabel="standard deviation of the gradient", title="noise")
    cost.plot(batch_sizes, np.asarray(seconds) * 1e3, **line(0, label="a step"))
    proportional = seconds[-1] * np.asarray(batch_sizes) / batch_sizes[-1]
    cost.plot(batch_sizes, proportional * 1e3, **line(1, label="if it went with the batch", marker=""))
    cost.set(ylabel="milliseconds", title="cost")
    for axes in (noise, cost):
        axes.set(xscale="log", yscale="log", xlabel="batch size")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def buffers_picture(velocities: Mapping[str, np.ndarray]) -> Figure:
    """Return the velocity [steps] of each rule against the step, by name."""
    figure = panels(2)
    axes = figure.subplots()
    for index, (name, values) in enumerate(velocities.items()):
        axes.plot(values, **line(index, label=name))
    axes.set(xlabel="step", ylabel="velocity after the step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
