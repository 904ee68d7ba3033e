"""Numbers that are not finite: which step made the first, and in which array."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from spec.batches import epoch_order
from spec.datasets import Dataset
from spec.recipe import Recipe
from spec.run.history import Position, StepsDone
from spec.run.pace import Pace
from spec.run.trainer import Cancelled, Trainer


class Fault(NamedTuple):
    """The first step of a run after which a number is not finite: its epoch (from 1), step (from 0) and loss; the first
    array of the state that it spoiled, or None if the loss alone is; and the `snapshot` before it."""

    epoch: int
    step: int
    loss: float
    leaf: str | None
    snapshot: Any

    def __str__(self) -> str:
        loss = "" if np.isfinite(self.loss) else f"the loss is {self.loss}"
        leaf = f"{self.leaf} is no longer finite after it" if self.leaf else ""
        return f"epoch {self.epoch}, step {self.step}: " + " and ".join(filter(None, (loss, leaf)))


def is_sound(done: StepsDone) -> bool:
    """Return whether every loss of the steps is finite, and every number of the state after them."""
    return done.finite and bool(np.isfinite(done.losses).all())


def find(trainer: Trainer, snapshot: Any, good: Position, bad: Position, pace: Pace) -> Fault | None:
    """Return the first fault between two positions of an epoch, the trainer sound at `good` with that `snapshot`, and
    no longer at `bad`; None where all is sound when it is done again, on a device that does not repeat itself.

    The steps are done again, a call of the pace's length at a time, then half of what is left of the faulty call:
    looking for a fault costs nothing until there is one. Leaves the trainer as it is after the faulty step. Raises
    Cancelled once the pace is told to stop.
    """
    low, high = good.step, good.step
    trainer.restore(snapshot)
    while high < bad.step:
        if pace.stopped():
            raise Cancelled
        high = pace.stop(Position(bad.epoch, low), steps_per_epoch=bad.step)
        began = time.perf_counter()
        if not is_sound(trainer.launch(bad.epoch, low, high)()):
            break
        pace.took(high - low, time.perf_counter() - began)
        low, snapshot = high, trainer.snapshot()
    if low == high:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        trainer.restore(snapshot)
        if is_sound(trainer.launch(bad.epoch, low, middle)()):
            low, snapshot = middle, trainer.snapshot()
        else:
            high = middle
    trainer.restore(snapshot)
    done = trainer.launch(bad.epoch, low, high)()
    leaf = _first_bad(trainer.named(trainer.snapshot()))
    return Fault(bad.epoch, low, float(done.losses[0]), leaf, snapshot)


def batch(recipe: Recipe, dataset: Dataset, fault: Fault) -> dict[str, np.ndarray]:
    """Return the batch of the faulty step: `indices` [batch] into the training split, `inputs` as the data set holds
    them, `labels` [batch] int32."""
    size = recipe.batch_size
    order = epoch_order(recipe.seed, fault.epoch, len(dataset.train.labels))
    indices = order[fault.step * size : (fault.step + 1) * size]
    return {
        "indices": indices.astype(np.int64),
        "inputs": dataset.train.inputs[indices],
        "labels": dataset.train.labels[indices],
    }


def _first_bad(state: Mapping[str, np.ndarray]) -> str | None:
    return next((name for name, array in state.items() if not np.isfinite(array).all()), None)
