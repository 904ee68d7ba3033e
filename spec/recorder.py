"""From a run's events to its files and its display: the one place where the two meet."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from spec.batches import Counts
from spec.display import Display
from spec.errors import UserError
from spec.history import EpochDone, Event, History
from spec.recipe import Recipe
from spec.run_directory import RunDirectory


class DivergedError(UserError):
    """The loss is no longer a finite number."""


class Recorder:
    """Takes a run's events, one by one: writes each to `metrics.jsonl`, and shows it.

    `epochs` are the figures of the epochs so far.
    """

    def __init__(self, recipe: Recipe, counts: Counts, directory: RunDirectory, display: Display) -> None:
        self.recipe, self.directory, self.display = recipe, directory, display
        self.epochs: list[Mapping] = []
        self._history = History(counts=counts, metrics=recipe.metrics)

    def take(self, event: Event) -> None:
        """Record one event. Raises DivergedError when a loss in it is not finite, naming epoch and step."""
        _refuse_divergence(event, self.recipe)
        if isinstance(event, EpochDone):
            figures = self._history.epoch(event)
            self.epochs.append(figures)
            self.directory.append_metrics("epoch", figures)
            self.display.epoch(figures)
            return
        figures = self._history.progress(event)
        self.directory.append_metrics("progress", figures)
        self.display.progress(figures)


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
    return f"it diverged; lower learning_rate (now {rate:g}), or scale the inputs down"
