"""S8: loss and accuracy before the update, summed and divided by examples; every test example scored once."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_impl.objective
import torch_ref.objective
from spec import oracle, recipe
from spec.batches import Counts, count, epoch_order
from spec.datasets import Dataset, Split
from spec.recipe import Metrics
from spec.run.history import EpochDone, History, StepsDone, running_loss, sum_of_correct_over_batch_size
from spec_tests import tolerances
from spec_tests.assertions import assert_within
from spec_tests.conftest import made_up_images
from spec_tests.test_s02_order import DATASETS, RUNS, TRAINERS, bound_of, oracles_run, trained
from spec_tests.tolerances import formula_bound, sum_bound

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
    [first] = history.progress(steps(0, [1.0, 2.0], [4, 2]))
    assert first["examples_seen"] == 8
    assert first["examples"] == 20
    assert first["cumulative_train_accuracy"] == 6 / 8
    assert first["batch_loss"] == 2.0
    history.progress(steps(2, [6.0], [0]))
    correct = np.array([True, True, False, True, True])
    figures = history.epoch(EpochDone(epoch=1, seconds=0.0, test_losses=np.arange(5.0), test_correct=correct))
    assert figures["train_loss"] == pytest.approx((4 * 1 + 4 * 2 + 2 * 6) / 10, rel=tolerances.ROUNDED_MEAN)
    assert figures["train_accuracy"] == pytest.approx(6 / 10, rel=tolerances.ROUNDED_MEAN)
    assert figures["test_loss"] == 2.0
    assert figures["test_accuracy"] == pytest.approx(4 / 5, rel=tolerances.ROUNDED_MEAN)
    lesson = figures["lesson_metrics"]
    assert lesson["mean_of_batch_train_accuracies"] == pytest.approx((1 + 0.5 + 0) / 3, rel=tolerances.ROUNDED_MEAN)
    assert lesson["running_loss"] == 6.0  # reset after two batches, one since
    assert lesson["sum_of_correct_over_batch_size"] == pytest.approx((3 / 4 + 1 / 4) / 2, rel=tolerances.ROUNDED_MEAN)


def test_cumulative_accuracy_runs_over_all_epochs():
    history = History(counts=COUNTS, metrics=METRICS)
    history.progress(steps(0, [1, 1, 1], [0, 0, 0]))
    history.epoch(EpochDone(epoch=1, seconds=0.0, test_losses=None, test_correct=None))
    *_, second = history.progress(steps(0, [1, 1, 1], [4, 4, 2], epoch=2))
    assert second["cumulative_train_accuracy"] == 0.5
    assert second["step"] == 6
    figures = history.epoch(EpochDone(epoch=2, seconds=0.0, test_losses=None, test_correct=None))
    assert figures["train_accuracy"] == 1.0
    assert figures["test_accuracy"] is None


def test_the_lessons_validation_accuracy_tops_out_below_one():
    assert sum_of_correct_over_batch_size(np.ones(10_000, bool), 64) == pytest.approx(
        10_000 / 64 / 157, rel=tolerances.ROUNDED_MEAN
    )
    assert round(sum_of_correct_over_batch_size(np.ones(10_000, bool), 64), 4) == 0.9952


@pytest.mark.parametrize(("count", "expected"), [(1, 0.0), (3, 1.0), (4, 3.0), (6, 4.0), (8, 6.5)])
def test_the_running_loss_is_reset_every_three_batches(count, expected):
    assert running_loss(np.arange(8.0)[:count], 3) == expected


# Both trainers


def small_trainer(side: str, **changes: object) -> tuple[object, Dataset]:
    changed = dataclasses.replace(recipe.load("mlp128"), precision="float64", **changes)
    dataset = made_up_images(100, 37)
    return TRAINERS[side](changed, dataset), dataset


def by_hand(state: dict[str, np.ndarray], split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return each example's loss, and whether mlp128 is right about it."""
    images = (split.inputs.astype(np.float32) / np.float32(255)).reshape(len(split.labels), -1).astype(np.float64)
    logits = np.maximum(images @ state["linear1.weight"].T, 0) @ state["linear2.weight"].T
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), split.labels]
    return losses, logits.argmax(axis=1) == split.labels


def assert_near(found: object, expected: object) -> None:
    """Losses of some nats, made of a hidden unit's 784 products and a logit's 128, come out right to their rounding."""
    bound = sum_bound(784 + 128, np.abs(expected).max(), np.float64)
    assert_within({"loss": np.asarray(found)}, {"loss": np.asarray(expected)}, bound=bound, item="losses")


@pytest.mark.parametrize("side", TRAINERS)
def test_the_first_figures_are_of_the_initial_state_before_its_update(side):
    trainer, dataset = small_trainer(side, batch_size=32, epochs=1, last_batch="keep")
    state = trainer.state()
    event = next(trainer.events())
    batch = epoch_order(0, 1, 100)[:32]
    losses, correct = by_hand(state, Split(dataset.train.inputs[batch], dataset.train.labels[batch]))
    assert_near(event.losses[0], losses.mean())
    assert event.num_correct[0] == correct.sum()
    assert len(event.losses) == 4


@pytest.mark.parametrize("batch_size", [1, 10, 37, 50])
@pytest.mark.parametrize("side", TRAINERS)
def test_every_test_example_is_scored_once_whatever_the_batch_size(side, batch_size):
    trainer, dataset = small_trainer(side, batch_size=batch_size)
    losses, predictions = trainer.evaluate()
    expected, correct = by_hand(trainer.state(), dataset.test)
    assert np.array_equal(predictions == dataset.test.labels, correct)
    assert_near(losses, expected)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("side", TRAINERS)
def test_an_epochs_test_figures_are_of_every_example_at_the_state_after_it(side, name):
    run, expected = trained(side, name)[0], oracles_run(name)
    for found, wanted in zip(run.tests, expected.tests, strict=True):
        assert found[0].shape == found[1].shape == wanted[1].shape == (11,)
        assert np.array_equal(found[1], wanted[1])
    assert_within(run.losses, expected.losses, bound=bound_of(name), item=f"{side}, {name}", relative_to_layer=True)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("side", TRAINERS)
def test_a_runs_figures_are_sums_over_its_examples_divided_by_their_number(side, name):
    loaded, dataset = RUNS[name][0], DATASETS[RUNS[name][1]]
    counts, expected = count(loaded, len(dataset.train.labels)), oracles_run(name)
    history = History(counts=counts, metrics=dataclasses.replace(METRICS, running_loss_every=2))
    epochs = []
    for event in trained(side, name)[1]:
        history.progress(event) if isinstance(event, StepsDone) else epochs.append(history.epoch(event))
    sizes, steps = counts.batch_sizes(), np.array(expected.steps)
    seen = correct = 0
    for index, (figures, (test_losses, test_correct)) in enumerate(zip(epochs, expected.tests, strict=True)):
        own = steps[index * len(sizes) : (index + 1) * len(sizes)]
        seen, correct = seen + sizes.sum(), correct + own[:, 1].sum()
        found = {name: figures[name] for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy")}
        wanted = {
            "train_loss": oracle.weighted_mean(own[:, 0], sizes),
            "train_accuracy": own[:, 1].sum() / sizes.sum(),
            "test_loss": test_losses.mean(),
            "test_accuracy": test_correct.mean(),
            "cumulative_train_accuracy": correct / seen,
            "mean_of_batch_train_accuracies": (own[:, 1] / sizes).mean(),
            "running_loss": own[-2 if len(sizes) % 2 == 0 else -1 :, 0].mean(),
        }
        found |= {name: value for name, value in figures["lesson_metrics"].items() if name in wanted}
        assert_within(found, wanted, bound=bound_of(name), item=f"{side}, {name}", relative_to_layer=True)


def test_several_logits_decide_by_the_largest_and_one_by_its_sign():
    logits = np.random.default_rng(0).integers(-2, 3, (200, 4)).astype(np.float32)  # many ties, many zeros
    for taken in (logits, logits[:, :1]):
        expected = oracle.predictions(taken).tolist()
        assert jax_impl.objective.predictions(jnp.asarray(taken)).tolist() == expected
        assert torch_ref.objective.predictions(torch.tensor(taken)).tolist() == expected


# History, for any batches


@settings(deadline=None, max_examples=50)
@given(
    num_examples=st.integers(1, 40),
    batch_size=st.integers(1, 40),
    last_batch=st.sampled_from(["keep", "drop"]),
    seed=st.integers(0, 99),
)
def test_for_any_batches_the_figures_weigh_every_example_alike(num_examples, batch_size, last_batch, seed):
    batch_size = min(batch_size, num_examples)
    changed = dataclasses.replace(recipe.load("mlp128"), batch_size=batch_size, last_batch=last_batch, epochs=1)
    counts, generator = count(changed, num_examples), np.random.default_rng(seed)
    used = num_examples if last_batch == "keep" else num_examples // batch_size * batch_size
    losses, right = generator.random(used), generator.random(used) < 0.5
    cuts = range(batch_size, used, batch_size)
    batches = zip(np.split(losses, cuts), np.split(right, cuts), strict=True)
    means, correct = zip(*((own.mean(), own_right.sum()) for own, own_right in batches), strict=True)
    history = History(counts=counts, metrics=METRICS)
    history.progress(steps(0, list(means), list(correct)))
    figures = history.epoch(EpochDone(epoch=1, seconds=0.0, test_losses=losses, test_correct=right))
    found = {name: figures[name] for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy")}
    expected = dict(zip(found, (losses.mean(), losses.mean(), right.mean(), right.mean()), strict=True))
    assert_within(found, expected, bound=formula_bound(1.0, np.float64), item="figures")
    assert figures["examples_seen"] == used
