"""Learning curves: train and test, loss and accuracy, of one run or of several over one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spec.plots.style import GREY, figure, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {"loss": "mean loss, nats", "accuracy": "accuracy"}
SPLITS = {"train": "--", "test": "-"}
MOST_MARKED = 40  # epochs; more markers would be a band


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
    of single batches behind its own.
    """
    picture = figure(10, 4.6)
    for axes, (quantity, label) in zip(picture.subplots(1, 2), PANELS.items(), strict=True):
        for index, curve in enumerate(curves):
            _draw(axes, curve, quantity, look(index))
        if quantity == "loss" and len(curves) == 1:
            _draw_batches(axes, curves[0])
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    _legend(picture, curves)
    return picture


def _draw(axes: Axes, curve: Curve, quantity: str, style: Mapping[str, str]) -> None:
    numbers = [epoch["epoch"] for epoch in curve.epochs]
    for split, dashes in SPLITS.items():
        values = [_number(epoch[f"{split}_{quantity}"]) for epoch in curve.epochs]
        if all(math.isnan(value) for value in values):
            continue
        filled = style["color"] if split == "test" else "white"
        size = 5 if len(values) <= MOST_MARKED else 0
        axes.plot(
            numbers, values, dashes, **style, markersize=size, markerfacecolor=filled, label=f"{split}: {curve.label}"
        )


def _draw_batches(axes: Axes, curve: Curve) -> None:
    """Draw the loss of the batch of each progress line where it was taken: its share of the run's examples."""
    lines = [line for line in curve.progress if line["batch_loss"] is not None]
    if lines and curve.planned:
        places = [line["examples_seen"] / line["examples"] * curve.planned for line in lines]
        losses = [line["batch_loss"] for line in lines]
        axes.plot(places, losses, ".", color=GREY, alpha=0.5, markersize=3, label="single batches")


def _legend(picture: Figure, curves: Sequence[Curve]) -> None:
    handles = {
        text: line for axes in picture.axes for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = 3 if len(curves) == 1 else 2
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
