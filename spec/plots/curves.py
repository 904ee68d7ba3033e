"""Learning curves: train and test, loss and accuracy, of one run or of several over one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spec.plots.style import BLACK, GREY, figure, look, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PANELS = {"loss": "mean loss, nats", "accuracy": "accuracy"}
SPLITS = {"train": "--", "test": "-"}
MOST_MARKED = 40  # epochs; more markers would be a band
WIDTH, HEIGHT, LINE = 10, 4.2, 0.23  # inches: of the figure, without its legend, and of a line of that
LETTERS = 110  # of a line of the legend, its marks taken off
LONGEST_LABEL = 80
THIN, MARK = 1.5, 5.0  # points: of the run on top, its line and its markers
WIDER, WIDEST = 2.5, 4.0  # points: a line more than the next run's, and at most more than the last one's


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A run's figures as `metrics.jsonl` has them: of each epoch, and its progress lines; `label` tells it from others,
    `planned` are the epochs that the whole run has."""

    label: str
    planned: int
    epochs: Sequence[Mapping[str, Any]]
    progress: Sequence[Mapping[str, Any]] = ()


def learning_curves(curves: Sequence[Curve]) -> Figure:
    """Return loss and accuracy by epoch: the test split's a full line, the training split's a dashed one.

    Training figures are an epoch's mean while it trained, test figures those after it. A run that is alone has the loss
    of single batches behind its own; of several, an earlier one is wider, to show under a later one that is equal.
    """
    handles, labels = _entries(curves)
    columns = max(1, min(len(labels), LETTERS // (max(map(len, labels), default=0) + 8)))
    picture = figure(WIDTH, HEIGHT + LINE * math.ceil(len(labels) / columns))
    for axes, (quantity, label) in zip(picture.subplots(1, 2, sharex=True), PANELS.items(), strict=True):
        for index, curve in enumerate(curves):
            _draw(axes, curve, quantity, _look(index, len(curves)))
        if quantity == "loss" and len(curves) == 1:
            _draw_batches(axes, curves[0])
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
    picture.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return picture


def _draw(axes: Axes, curve: Curve, quantity: str, style: Mapping[str, Any]) -> None:
    numbers = [epoch["epoch"] for epoch in curve.epochs]
    for split, dashes in SPLITS.items():
        values = [_number(epoch[f"{split}_{quantity}"]) for epoch in curve.epochs]
        if all(math.isnan(value) for value in values):
            continue
        filling = {"markerfacecolor": _filling(split, style)} | ({"markersize": 0} if len(values) > MOST_MARKED else {})
        axes.plot(numbers, values, dashes, **style | filling, label=f"{split}: {curve.label}")


def _look(index: int, number: int) -> dict[str, Any]:
    """Return matplotlib's keywords for the run of that index, from 0, of a number of them."""
    wider = (number - 1 - index) * min(WIDER, WIDEST / max(1, number - 1))
    return look(index) | {"linewidth": THIN + wider, "markersize": MARK + 1.5 * wider}


def _draw_batches(axes: Axes, curve: Curve) -> None:
    """Draw the loss of the batch of each progress line where it was taken: its share of the run's examples."""
    if lines := _batches(curve):
        places = [line["examples_seen"] / line["examples"] * curve.planned for line in lines]
        losses = [line["batch_loss"] for line in lines]
        axes.plot(places, losses, ".", color=GREY, alpha=0.5, markersize=3, label="single batches")


def _entries(curves: Sequence[Curve]) -> tuple[list[Line2D], list[str]]:
    """Return the lines and words of the legend: what the dashes are, and where there are several runs, each of them."""
    from matplotlib.lines import Line2D

    names, alone = short([curve.label for curve in curves], LONGEST_LABEL), len(curves) == 1
    style = look(0) if alone else {"color": BLACK, "marker": "o"}
    entries = [
        (Line2D([], [], **style, linestyle=dashes, markersize=MARK, markerfacecolor=_filling(split, style)), split)
        for split, dashes in SPLITS.items()
        if any(_has(curve, split) for curve in curves)
    ]
    if alone:
        entries = [(line, f"{split}: {names[0]}") for line, split in entries]
        dots = {"color": GREY, "alpha": 0.5, "marker": ".", "linestyle": "", "markersize": 3}
        entries += [(Line2D([], [], **dots), "single batches")] if _batches(curves[0]) else []
    else:
        entries += [(Line2D([], [], **_look(index, len(names))), name) for index, name in enumerate(names)]
    return [line for line, _ in entries], [name for _, name in entries]


def _filling(split: str, style: Mapping[str, Any]) -> str:
    return style["color"] if split == "test" else "white"


def _has(curve: Curve, split: str) -> bool:
    return any(epoch[f"{split}_{quantity}"] is not None for epoch in curve.epochs for quantity in PANELS)


def _batches(curve: Curve) -> list[Mapping[str, Any]]:
    return [line for line in curve.progress if line["batch_loss"] is not None]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
