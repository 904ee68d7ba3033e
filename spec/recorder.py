"""From a run's events to its files and its display: the one place where the two meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from spec.display import Display
from spec.errors import UserError
from spec.history import EpochDone, Event, History
from spec.recipe import Recipe
from spec.run_directory import RunDirectory


class DivergedError(UserError):
    """The loss is no longer a finite number."""


def record(
    events: Iterable[Event], recipe: Recipe, history: History, directory: RunDirectory, display: Display
) -> list[Mapping]:
    """Write each event to `metrics.jsonl` and show it; return the figures of every epoch.

    Raises DivergedError at the first training or test loss that is not finite, naming epoch and step.
    """
    epochs = []
    for event in events:
        _refuse_divergence(event, recipe)
        if isinstance(event, EpochDone):
            figures = history.epoch(event)
            epochs.append(figures)
            directory.append_metrics("epoch", figures)
            display.epoch(figures)
            continue
        figures = history.progress(event)
        directory.append_metrics("progress", figures)
        display.progress(figures)
    return epochs


def refuse_nonfinite(state: Mapping[str, np.ndarray], recipe: Recipe) -> None:
    """Raise DivergedError, naming the first leaf, when the final state holds a number that is not finite."""
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise DivergedError(f"{name} is not finite after the last step: {_mend(recipe)}")


def _refuse_divergence(event: Event, recipe: Recipe) -> None:
    if isinstance(event, EpochDone):
        if event.test_losses is not None and not np.isfinite(event.test_losses).all():
            raise DivergedError(f"the test loss is not finite after epoch {event.epoch}: {_mend(recipe)}")
        return
    bad = np.flatnonzero(~np.isfinite(event.losses))
    if bad.size:
        loss, step = event.losses[bad[0]], event.start + bad[0]
        raise DivergedError(f"the loss is {loss} at epoch {event.epoch}, step {step}: {_mend(recipe)}")


def _mend(recipe: Recipe) -> str:
    rate = recipe.optimizer.learning_rate
    return f"it diverged; lower --learning-rate (now {rate:g}), or scale the inputs down"
