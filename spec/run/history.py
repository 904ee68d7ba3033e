"""What happens in a run, as events, and the figures made of them (S8). Both implementations send the same events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from spec.batches import Counts
from spec.recipe import Metrics


class Position(NamedTuple):
    """How far a run is: `step` steps of `epoch` (from 1) are done. After an epoch's last step its evaluation follows;
    with that it is at step 0 of the next."""

    epoch: int
    step: int


START = Position(epoch=1, step=0)


@dataclass(frozen=True, kw_only=True)
class StepsDone:
    """Steps [start, stop) of `epoch` are done, `seconds` after what was before them: mean loss in nats and right
    answers of each, before its update.

    A step that was skipped has a loss of nan. `finite` says that every number of the state is, after the last of them;
    `at_rest`, that this is the trainer's state still, no later step being on its way.
    """

    epoch: int
    start: int
    stop: int
    losses: np.ndarray
    num_correct: np.ndarray
    seconds: float = 0.0
    finite: bool = True
    at_rest: bool = True


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """An epoch is done, `seconds` after its last step: loss and correctness of each test example, where there is a test
    split."""

    epoch: int
    seconds: float
    test_losses: np.ndarray | None
    test_correct: np.ndarray | None


Event = StepsDone | EpochDone


@dataclass(kw_only=True)
class History:
    """Folds events into the figures of the run so far. Sums divided by examples, never a mean of means (S8).

    A step whose loss is no finite number, one that was skipped or one that failed, counts in no figure of loss or
    accuracy; a figure of nothing is None.
    """

    counts: Counts
    metrics: Metrics
    losses: np.ndarray = field(init=False)
    num_correct: np.ndarray = field(init=False)
    position: Position = START
    seconds: float = 0.0
    total_correct: int = 0
    total_judged: int = 0

    def __post_init__(self) -> None:
        self.batch_sizes = self.counts.batch_sizes()
        self.losses = np.zeros(self.counts.steps_per_epoch)
        self.num_correct = np.zeros(self.counts.steps_per_epoch, np.int64)

    @property
    def step(self) -> int:
        """Return the steps done since the run began."""
        return (self.position.epoch - 1) * self.counts.steps_per_epoch + self.position.step

    def progress(self, event: StepsDone) -> list[dict[str, Any]]:
        """Take the steps in; return the lesson's progress line for every `progress_every` steps of the epoch among
        them, and for its last: samples seen of all, loss of the last batch, cumulative accuracy over all epochs, and
        the running loss over the last `running_loss_every` batches."""
        span = slice(event.start, event.stop)
        self.losses[span], self.num_correct[span] = event.losses, event.num_correct
        self.seconds += event.seconds
        lines, start = [], event.start
        for stop in self._boundaries(event.start, event.stop):
            judged = np.isfinite(self.losses[start:stop])
            self.total_correct += int(self.num_correct[start:stop][judged].sum())
            self.total_judged += int(self.batch_sizes[start:stop][judged].sum())
            self.position, start = Position(event.epoch, stop), stop
            if stop % self.metrics.progress_every == 0 or stop == self.counts.steps_per_epoch:
                lines.append(self._line())
        return lines

    def epoch(self, event: EpochDone) -> dict[str, Any]:
        """Return the figures of the epoch that just ended."""
        judged = np.isfinite(self.losses)
        sizes, correct = self.batch_sizes[judged], self.num_correct[judged]
        tested = event.test_losses is not None
        figures = {
            "epoch": event.epoch,
            "step": event.epoch * self.counts.steps_per_epoch,
            "examples_seen": self._examples_seen(),
            "seconds": self.seconds + event.seconds,
            "train_loss": _ratio(self.losses[judged] @ sizes, sizes.sum()),
            "train_accuracy": _ratio(correct.sum(), sizes.sum()),
            "cumulative_train_accuracy": _ratio(self.total_correct, self.total_judged),
            "test_loss": _finite(event.test_losses.mean(dtype=np.float64)) if tested else None,
            "test_accuracy": float(event.test_correct.mean(dtype=np.float64)) if tested else None,
            "lesson_metrics": {name: self._lesson_metric(name, event) for name in self.metrics.lesson},
            "nonfinite_steps": int((~judged).sum()),
        }
        self.position, self.seconds = Position(event.epoch + 1, 0), 0.0
        return figures

    def to_mapping(self) -> dict[str, Any]:
        """Return what a run is gone on with, as JSON takes it: position, totals, and this epoch's steps so far."""
        done = slice(self.position.step)
        return {
            "position": self.position._asdict(),
            "seconds": self.seconds,
            "total_correct": self.total_correct,
            "total_judged": self.total_judged,
            "losses": [_finite(loss) for loss in self.losses[done]],
            "num_correct": self.num_correct[done].tolist(),
        }

    def take_over(self, mapping: Mapping[str, Any]) -> None:
        """Go on from what `to_mapping` gave."""
        self.position = Position(**mapping["position"])
        self.seconds = mapping["seconds"]
        self.total_correct, self.total_judged = mapping["total_correct"], mapping["total_judged"]
        done = slice(self.position.step)
        self.losses[done] = [np.nan if loss is None else loss for loss in mapping["losses"]]
        self.num_correct[done] = mapping["num_correct"]

    def _boundaries(self, start: int, stop: int) -> Iterator[int]:
        """Yield where the steps [start, stop) of an epoch part by progress lines, `stop` included."""
        every = self.metrics.progress_every
        yield from range(start - start % every + every, stop, every)
        yield stop

    def _line(self) -> dict[str, Any]:
        stop = self.position.step
        return {
            "epoch": self.position.epoch,
            "step": self.step,
            "examples_seen": self._examples_seen(),
            "examples": self.counts.examples_seen,
            "batch_loss": _finite(self.losses[stop - 1]),
            "cumulative_train_accuracy": _ratio(self.total_correct, self.total_judged),
            "running_loss": running_loss(self.losses[:stop], self.metrics.running_loss_every),
        }

    def _examples_seen(self) -> int:
        epoch, step = self.position
        return (epoch - 1) * self.counts.examples_per_epoch + int(self.batch_sizes[:step].sum())

    def _lesson_metric(self, name: str, event: EpochDone) -> float | None:
        """Return one of the lesson's own figures, slips included (recipes.md, 8 and 11)."""
        if name == "cumulative_train_accuracy":
            return _ratio(self.total_correct, self.total_judged)
        if name == "mean_of_batch_train_accuracies":
            judged = np.isfinite(self.losses)
            return _ratio((self.num_correct / self.batch_sizes)[judged].sum(), judged.sum())
        if name == "running_loss":
            return running_loss(self.losses, self.metrics.running_loss_every)
        if event.test_correct is None:
            return None
        return sum_of_correct_over_batch_size(event.test_correct, self.counts.batch_size)


def running_loss(losses: np.ndarray, every: int) -> float | None:
    """Return the mean of the batch losses since the last reset; a reset follows every `every` batches.

    Right after a full window it is that window's mean, as the lesson prints it: mean(losses[k - every : k]).
    """
    window = losses[-(len(losses) % every or min(every, len(losses))) :]
    judged = window[np.isfinite(window)]
    return float(judged.mean()) if judged.size else None


def sum_of_correct_over_batch_size(correct: np.ndarray, batch_size: int) -> float:
    """Return the lesson's validation accuracy: sum over batches of (right answers / batch_size), over the batches.

    A short last batch is divided by the full size, so it cannot reach 1: 10,000 examples by 64 top out at 0.9952.
    """
    batches = -(-len(correct) // batch_size)
    return float(correct.sum() / batch_size / batches)


def _ratio(total: float, number: float) -> float | None:
    return float(total / number) if number else None


def _finite(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None
