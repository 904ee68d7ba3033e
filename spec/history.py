"""What happens in a run, as events, and the figures made of them (S8). Both implementations send the same events."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spec.batches import Counts
from spec.recipe import Metrics


@dataclass(frozen=True, kw_only=True)
class StepsDone:
    """Steps [start, stop) of `epoch` are done: mean loss in nats and right answers of each, before its update."""

    epoch: int
    start: int
    stop: int
    losses: np.ndarray
    num_correct: np.ndarray


@dataclass(frozen=True, kw_only=True)
class EpochDone:
    """An epoch is done, after `seconds`: loss and correctness of each test example, where there is a test split."""

    epoch: int
    seconds: float
    test_losses: np.ndarray | None
    test_correct: np.ndarray | None


Event = StepsDone | EpochDone


@dataclass(kw_only=True)
class History:
    """Folds events into the figures of the run so far. Sums divided by examples, never a mean of means (S8)."""

    counts: Counts
    metrics: Metrics
    losses: np.ndarray = field(init=False)
    num_correct: np.ndarray = field(init=False)
    total_correct: int = 0
    examples_seen: int = 0

    def __post_init__(self) -> None:
        self.batch_sizes = self.counts.batch_sizes()
        self.losses = np.zeros(self.counts.steps_per_epoch)
        self.num_correct = np.zeros(self.counts.steps_per_epoch, np.int64)

    def progress(self, event: StepsDone) -> dict[str, float]:
        """Take the steps in; return the lesson's progress line: samples seen of all, loss of the last batch, cumulative
        accuracy over all epochs, and the running loss over the last `running_loss_every` batches."""
        span = slice(event.start, event.stop)
        self.losses[span] = event.losses
        self.num_correct[span] = event.num_correct
        self.total_correct += int(event.num_correct.sum())
        self.examples_seen += int(self.batch_sizes[span].sum())
        return {
            "epoch": event.epoch,
            "step": (event.epoch - 1) * self.counts.steps_per_epoch + event.stop,
            "examples_seen": self.examples_seen,
            "examples": self.counts.examples_seen,
            "batch_loss": float(self.losses[event.stop - 1]),
            "cumulative_train_accuracy": self.total_correct / self.examples_seen,
            "running_loss": running_loss(self.losses[: event.stop], self.metrics.running_loss_every),
        }

    def epoch(self, event: EpochDone) -> dict[str, object]:
        """Return the figures of the epoch that just ended."""
        tested = event.test_losses is not None
        return {
            "epoch": event.epoch,
            "step": event.epoch * self.counts.steps_per_epoch,
            "examples_seen": self.examples_seen,
            "seconds": event.seconds,
            "train_loss": float(self.losses @ self.batch_sizes / self.batch_sizes.sum()),
            "train_accuracy": float(self.num_correct.sum() / self.batch_sizes.sum()),
            "cumulative_train_accuracy": self.total_correct / self.examples_seen,
            "test_loss": float(event.test_losses.mean(dtype=np.float64)) if tested else None,
            "test_accuracy": float(event.test_correct.mean(dtype=np.float64)) if tested else None,
            "lesson_metrics": {name: self._lesson_metric(name, event) for name in self.metrics.lesson},
        }

    def _lesson_metric(self, name: str, event: EpochDone) -> float | None:
        """Return one of the lesson's own figures, slips included (recipes.md, 8 and 11)."""
        if name == "cumulative_train_accuracy":
            return self.total_correct / self.examples_seen
        if name == "mean_of_batch_train_accuracies":
            return float((self.num_correct / self.batch_sizes).mean())
        if name == "running_loss":
            return running_loss(self.losses, self.metrics.running_loss_every)
        if event.test_correct is None:
            return None
        return sum_of_correct_over_batch_size(event.test_correct, self.counts.batch_size)


def running_loss(losses: np.ndarray, every: int) -> float:
    """Return the mean of the batch losses since the last reset; a reset follows every `every` batches.

    Right after a full window it is that window's mean, as the lesson prints it: mean(losses[k - every : k]).
    """
    window = len(losses) % every or min(every, len(losses))
    return float(losses[-window:].mean())


def sum_of_correct_over_batch_size(correct: np.ndarray, batch_size: int) -> float:
    """Return the lesson's validation accuracy: sum over batches of (right answers / batch_size), over the batches.

    A short last batch is divided by the full size, so it cannot reach 1: 10,000 examples by 64 top out at 0.9952.
    """
    batches = -(-len(correct) // batch_size)
    return float(correct.sum() / batch_size / batches)
