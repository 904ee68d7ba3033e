"""From a run's events to its files and its display: the one place where the two meet."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from spec.batches import Counts
from spec.datasets import Dataset
from spec.errors import UserError
from spec.recipe import Recipe
from spec.run import faults
from spec.run.display import Display
from spec.run.history import EpochDone, Event, History
from spec.run.run_directory import TENSORBOARD, RunDirectory
from spec.run.tensorboard import TensorBoard


class DivergedError(UserError):
    """A loss, or a number of the state, is no longer finite."""


class Recorder:
    """Takes a run's events, one by one: writes each to `metrics.jsonl`, and shows it.

    `epochs` are the figures of the epochs so far, `history` how far the run is. Unless `diverging` runs are let go on,
    one is refused.
    """

    def __init__(
        self, recipe: Recipe, counts: Counts, directory: RunDirectory, display: Display, *, diverging: bool = False
    ) -> None:
        self.recipe, self.directory, self.display = recipe, directory, display
        self.epochs: list[Mapping] = []
        self.history = History(counts=counts, metrics=recipe.metrics)
        self._diverging = diverging
        self.board: TensorBoard | None = None

    def go_on(self, history: Mapping, metrics: bytes) -> None:
        """Go on from the history and the lines of an earlier part of the run."""
        self.history.take_over(history)
        lines = [json.loads(line) for line in metrics.splitlines()]
        self.epochs = [{name: of[name] for name in of if name != "event"} for of in lines if of["event"] == "epoch"]

    def open_board(self, dataset: Dataset) -> None:
        """Write the run for TensorBoard too, from its first line on."""
        with self.directory.explained():
            folder = self.directory.folder / TENSORBOARD
            self.board = TensorBoard(folder, self.recipe, dataset, self.directory.metrics())

    def finish(self) -> None:
        """Say where it is shown that the run is finished."""
        if self.board:
            with self.directory.explained():
                self.board.finish()

    def close(self) -> None:
        """Close what is open."""
        if self.board:
            with self.directory.explained():
                self.board.close()

    def take(self, event: Event) -> None:
        """Record one event. Raises DivergedError when a number in it is not finite, naming the epoch, and recording
        nothing."""
        if not self._diverging:
            _refuse_divergence(event, self.recipe)
        if isinstance(event, EpochDone):
            figures = self.history.epoch(event)
            self.epochs.append(figures)
            self._write("epoch", figures)
            self.display.epoch(figures)
            return
        for figures in self.history.progress(event):
            self._write("progress", figures)
            self.display.progress(figures)

    def _write(self, event: str, figures: Mapping) -> None:
        self.directory.append_metrics(event, figures)
        if self.board:
            with self.directory.explained():
                self.board.add(event, figures)

    def summary(self, seconds: float, compile_seconds: float) -> dict:
        """Return the summary of a finished run: counts, times, and the last epoch's figures."""
        last = self.epochs[-1]
        return {
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "precision": self.recipe.precision,
            "epochs": len(self.epochs),
            "steps": last["step"],
            "examples_seen": last["examples_seen"],
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            **{name: last[name] for name in ("train_loss", "train_accuracy", "cumulative_train_accuracy")},
            **{name: last[name] for name in ("test_loss", "test_accuracy", "lesson_metrics")},
        }


def mend(recipe: Recipe) -> str:
    """Return what a user can do about a run that diverged."""
    rate = recipe.optimizer.learning_rate
    return f"it diverged; lower learning_rate (now {rate:g}), or scale the inputs down"


def _refuse_divergence(event: Event, recipe: Recipe) -> None:
    if isinstance(event, EpochDone):
        if event.test_losses is not None and not np.isfinite(event.test_losses).all():
            raise DivergedError(f"the test loss is not finite after epoch {event.epoch}: {mend(recipe)}")
        return
    bad = np.flatnonzero(~np.isfinite(event.losses))
    if bad.size:
        loss, step = event.losses[bad[0]], event.start + bad[0]
        raise DivergedError(f"the loss is {loss} at epoch {event.epoch}, step {step}: {mend(recipe)}")
    if not faults.is_sound(event):
        raise DivergedError(f"the state is not finite at epoch {event.epoch}, step {event.stop - 1}: {mend(recipe)}")
