"""What a framework offers: a trainer of one run, the order it does things in, and the parts around it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spec.batches import Counts
from spec.datasets import Dataset
from spec.params import Leaf
from spec.recipe import Recipe
from spec.run.history import START, EpochDone, Event, Position, StepsDone
from spec.run.pace import Pace

Tested = tuple[np.ndarray, np.ndarray] | tuple[None, None]


class Cancelled(Exception):  # noqa: N818 - nothing went wrong
    """An evaluation was given up half-way, as asked."""


class Trainer(ABC):
    """One run of a recipe, ready to go. `test_labels` [n] are those of the test split, None without one."""

    recipe: Recipe
    counts: Counts
    leaves: tuple[Leaf, ...]
    compile_seconds: float
    test_labels: np.ndarray | None

    @abstractmethod
    def launch(self, epoch: int, start: int, stop: int) -> Callable[[], StepsDone]:
        """Begin the steps [start, stop) of `epoch`, behind those that are on their way; the returned function waits for
        them. What it says of `seconds` and `at_rest` is filled in by `events`."""

    @abstractmethod
    def evaluate(self, cancelled: Callable[[], bool] = lambda: False) -> Tested:
        """Return loss [n] and predicted class [n] of each test example as the state is now; None without a split.

        Raises Cancelled soon after `cancelled` says so.
        """

    @abstractmethod
    def state(self) -> dict[str, np.ndarray]:
        """Return the present parameters and running statistics, canonical names and layouts."""

    @abstractmethod
    def snapshot(self) -> Any:
        """Return all that a step changes, at rest, as NumPy arrays of their own."""

    @abstractmethod
    def restore(self, snapshot: Any) -> None:
        """Take over what `snapshot` gave, bit for bit; the snapshot stays as it is."""

    @abstractmethod
    def named(self, snapshot: Any) -> Mapping[str, np.ndarray]:
        """Return the arrays of a snapshot: the canonical state, then the optimiser's as `optimizer.NAME`."""

    def signal_elsewhere(self) -> int | None:
        """Return the number of a signal that another process of this run was given; None without one."""
        return None

    def events(self, *, start: Position = START, pace: Pace | None = None) -> Iterator[Event]:
        """Run every epoch from `start` on, yielding what happens, until the end or until the pace says to stop; unless
        one is given, an epoch's steps are one call.

        A call's figures are read while the next one is under way, so that the device never waits.
        """
        pace = pace or Pace(steps=self.counts.steps_per_epoch)
        for epoch in range(start.epoch, self.counts.epochs + 1):
            yield from self._steps(epoch, start.step if epoch == start.epoch else 0, pace)
            if pace.stopped():
                return
            began = time.perf_counter()
            try:
                losses, predictions = self.evaluate(pace.stopped)
            except Cancelled:
                return
            correct = None if predictions is None else predictions == self.test_labels
            seconds = time.perf_counter() - began
            yield EpochDone(epoch=epoch, seconds=seconds, test_losses=losses, test_correct=correct)
            if pace.stopped():
                return

    def _steps(self, epoch: int, step: int, pace: Pace) -> Iterator[StepsDone]:
        """Run the steps of an epoch from `step` on, with one call on its way behind the one that is waited for."""
        last, waiting = time.perf_counter(), None
        while True:
            launched = None
            position = Position(epoch, step)
            if step < self.counts.steps_per_epoch and not (pace.stopped() or (waiting and pace.rests(position))):
                step = pace.stop(position, steps_per_epoch=self.counts.steps_per_epoch)
                launched = self.launch(epoch, position.step, step)
            if waiting:
                done, now = waiting(), time.perf_counter()
                pace.took(done.stop - done.start, now - last)
                yield replace(done, seconds=now - last, at_rest=launched is None)
                last = now
            elif launched is None:
                return
            waiting = launched


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A framework's parts of the program; `packages` are those whose versions a run depends on.

    `prepare` starts what needs no data, and returns what makes a trainer of the data; the trainer skips steps that
    make a number infinite or nan if told to. `write_state` writes a trainer's snapshot into a folder, `read_state`
    gives it back, for that trainer.
    """

    framework: str
    packages: tuple[str, ...]
    select_device: Callable[..., Any]
    describe_devices: Callable[[Any], list[str]]
    load: Callable[..., Dataset]
    prepare: Callable[..., Callable[[Dataset], Trainer]]
    memory_explained: Callable[[], AbstractContextManager]
    write_state: Callable[[Any, Path], None]
    read_state: Callable[[Trainer, Path], Any]
