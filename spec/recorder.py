"""From a run's events to its files and its display: the one place where the two meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from spec.display import Display
from spec.errors import UserError
from spec.history import EpochDone, Event, History, StepsDone
from spec.recipe import Recipe
from spec.run_directory import RunDirectory


class DivergedError(UserError):
    """The loss is no longer a finite number."""


def record(
    events: Iterable[Event], recipe: Recipe, history: History, directory: RunDirectory, display: Display
) -> list[Mapping]:
    """Write each event to `metrics.jsonl` and show it; return the figures of every epoch.

    Raises DivergedError at the first loss that is not finite, naming epoch and step.
    """
    epochs = []
    for event in events:
        if isinstance(event, EpochDone):
            figures = history.epoch(event)
            epochs.append(figures)
            directory.append_metrics("epoch", figures)
            display.epoch(figures)
            continue
        _refuse_divergence(event, recipe)
        figures = history.progress(event)
        directory.append_metrics("progress", figures)
        display.progress(figures)
    return epochs


def _refuse_divergence(event: StepsDone, recipe: Recipe) -> None:
    bad = np.flatnonzero(~np.isfinite(event.losses))
    if bad.size:
        raise DivergedError(
            f"the loss is {event.losses[bad[0]]} at epoch {event.epoch}, step {event.start + bad[0]}: it diverged; "
            f"lower --learning-rate (now {recipe.optimizer.learning_rate:g}), or scale the inputs down"
        )
