"""S8: loss and accuracy before the update, summed and divided by examples; every test example scored once."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jax_impl.trainer import Trainer
from spec import recipe
from spec.batches import Counts, epoch_order
from spec.history import EpochDone, History, StepsDone, running_loss, sum_of_correct_over_batch_size
from spec.recipe import Metrics
from spec_tests.conftest import made_up_images

METRICS = Metrics(
    progress_every=2,
    running_loss_every=2,
    lesson=(
        "cumulative_train_accuracy",
        "mean_of_batch_train_accuracies",
        "running_loss",
        "sum_of_correct_over_batch_size",
    ),
)
COUNTS = Counts(num_examples=10, batch_size=4, full_steps=2, short_batch_size=2, epochs=2)


def steps(start: int, losses: list[float], correct: list[int], *, epoch: int = 1) -> StepsDone:
    return StepsDone(
        epoch=epoch, start=start, stop=start + len(losses), losses=np.array(losses), num_correct=np.array(correct)
    )


def test_an_epochs_figures_weigh_the_short_batch_by_its_size():
    history = History(counts=COUNTS, metrics=METRICS)
    first = history.progress(steps(0, [1.0, 2.0], [4, 2]))
    assert first["examples_seen"] == 8
    assert first["examples"] == 20
    assert first["cumulative_train_accuracy"] == 6 / 8
    assert first["batch_loss"] == 2.0
    history.progress(steps(2, [6.0], [0]))
    correct = np.array([True, True, False, True, True])
    figures = history.epoch(EpochDone(epoch=1, seconds=0.0, test_losses=np.arange(5.0), test_correct=correct))
    assert figures["train_loss"] == pytest.approx((4 * 1 + 4 * 2 + 2 * 6) / 10)
    assert figures["train_accuracy"] == pytest.approx(6 / 10)
    assert figures["test_loss"] == 2.0
    assert figures["test_accuracy"] == pytest.approx(4 / 5)
    lesson = figures["lesson_metrics"]
    assert lesson["mean_of_batch_train_accuracies"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert lesson["running_loss"] == 6.0  # reset after two batches, one since
    assert lesson["sum_of_correct_over_batch_size"] == pytest.approx((3 / 4 + 1 / 4) / 2)


def test_cumulative_accuracy_runs_over_all_epochs():
    history = History(counts=COUNTS, metrics=METRICS)
    history.progress(steps(0, [1, 1, 1], [0, 0, 0]))
    history.epoch(EpochDone(epoch=1, seconds=0.0, test_losses=None, test_correct=None))
    second = history.progress(steps(0, [1, 1, 1], [4, 4, 2], epoch=2))
    assert second["cumulative_train_accuracy"] == 0.5
    assert second["step"] == 6
    figures = history.epoch(EpochDone(epoch=2, seconds=0.0, test_losses=None, test_correct=None))
    assert figures["train_accuracy"] == 1.0
    assert figures["test_accuracy"] is None


def test_the_lessons_validation_accuracy_tops_out_below_one():
    assert sum_of_correct_over_batch_size(np.ones(10_000, bool), 64) == pytest.approx(10_000 / 64 / 157)
    assert round(sum_of_correct_over_batch_size(np.ones(10_000, bool), 64), 4) == 0.9952


@pytest.mark.parametrize(("count", "expected"), [(1, 0.0), (3, 1.0), (4, 3.0), (6, 4.0), (8, 6.5)])
def test_the_running_loss_is_reset_every_three_batches(count, expected):
    assert running_loss(np.arange(8.0)[:count], 3) == expected


def small_trainer(**changes: object) -> tuple[Trainer, object]:
    changed = dataclasses.replace(recipe.load("mlp128"), precision="float64", **changes)
    dataset = made_up_images(100, 37)
    return Trainer(changed, dataset, jax.devices("cpu")[0]), dataset


def test_the_first_figures_are_of_the_initial_state_before_its_update():
    trainer, dataset = small_trainer(batch_size=32, epochs=1, last_batch="keep")
    state = trainer.state()
    event = next(trainer.events())
    batch = epoch_order(0, 1, 100)[:32]
    images = (dataset.train.inputs[batch].astype(np.float32) / np.float32(255)).reshape(32, -1).astype(np.float64)
    logits = np.maximum(images @ state["linear1.weight"].T, 0) @ state["linear2.weight"].T
    labels = dataset.train.labels[batch]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(32), labels]
    assert event.losses[0] == pytest.approx(losses.mean(), abs=1e-14)
    assert event.num_correct[0] == (logits.argmax(axis=1) == labels).sum()
    assert len(event.losses) == 4


@pytest.mark.parametrize("batch_size", [1, 10, 37, 50])
def test_every_test_example_is_scored_once_whatever_the_batch_size(batch_size):
    trainer, dataset = small_trainer(batch_size=batch_size)
    state = trainer.state()
    losses, correct = trainer.evaluate()
    images = (dataset.test.inputs.astype(np.float32) / np.float32(255)).reshape(37, -1).astype(np.float64)
    logits = np.maximum(images @ state["linear1.weight"].T, 0) @ state["linear2.weight"].T
    assert np.array_equal(correct, logits.argmax(axis=1) == dataset.test.labels)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(37), dataset.test.labels]
    assert np.abs(losses - expected).max() < 1e-13
