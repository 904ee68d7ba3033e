"""S2: the order of an epoch, the steps, the last batch; both trainers are the plain loop of the oracle over them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

import jax_impl.programs
import jax_impl.trainer
import torch_ref.data
import torch_ref.trainer
from jax_impl.epoch import DeviceSplit, Span, make_run_steps
from jax_impl.parallel import place
from jax_impl.step import StepMetrics, TrainState
from spec import params, recipe
from spec.batches import Counts, count, epoch_order
from spec.datasets import Dataset, Split
from spec.errors import RecipeError
from spec.recipe import Optimizer, Recipe, Schedule
from spec.run.history import EpochDone, StepsDone
from spec.run.pace import Pace
from spec_tests.adapters import Network, OracleAdapter
from spec_tests.assertions import assert_identical, assert_within
from spec_tests.tolerances import run_bound

MLP128 = recipe.load("mlp128")
TRAINERS = {
    "jax": lambda recipe, dataset: jax_impl.trainer.Trainer(recipe, dataset, place("cpu")),
    "torch": lambda recipe, dataset: torch_ref.trainer.Trainer(recipe, dataset, torch.device("cpu")),
}


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "last_batch", "steps", "last"),
    [
        (500, 120, "drop", 4, 120),
        (50_000, 4_000, "keep", 13, 2_000),
        (569, 5, "keep", 114, 4),
        (60_000, 128, "drop", 468, 128),
        (60_000, 128, "keep", 469, 96),
        (60_000, 64, "drop", 937, 64),
        (60_000, 64, "keep", 938, 32),
        (60_000, 256, "drop", 234, 256),
        (60_000, 256, "keep", 235, 96),
        (60_000, 124, "drop", 483, 124),
        (60_000, 124, "keep", 484, 108),
        (10, 10, "keep", 1, 10),
        (1, 1, "drop", 1, 1),
    ],
)
def test_steps_of_an_epoch_are_the_floor_or_keeping_the_last_the_ceiling(
    num_examples, batch_size, last_batch, steps, last
):
    changed = dataclasses.replace(MLP128, batch_size=batch_size, last_batch=last_batch, epochs=3)
    counts = count(changed, num_examples)
    sizes = counts.batch_sizes()
    assert counts.steps_per_epoch == len(sizes) == steps
    assert sizes[-1] == last
    assert counts.examples_per_epoch == sizes.sum() == (num_examples if last_batch == "keep" else steps * batch_size)
    assert counts.steps == 3 * steps
    assert counts.examples_seen == 3 * sizes.sum()


def test_a_batch_larger_than_the_data_is_refused_with_the_largest_that_fits():
    with pytest.raises(RecipeError, match=r"batch_size 128 is larger than .* 100 examples; use batch_size 100"):
        count(MLP128, 100)


def test_a_batch_of_one_is_refused_where_batchnorm_needs_its_variance():
    cnn = recipe.load("cnn")
    with pytest.raises(RecipeError, match="leaves a batch of one example"):
        count(cnn, 129)
    assert count(dataclasses.replace(cnn, last_batch="drop"), 129).steps_per_epoch == 2
    assert count(cnn, 130).short_batch_size == 2
    with pytest.raises(RecipeError, match="batch of one"):
        count(dataclasses.replace(cnn, batch_size=1, last_batch="drop"), 129)
    with pytest.raises(RecipeError, match="batch of one"):
        count(recipe.load("mlp128-batchnorm"), 129)


def test_the_order_of_an_epoch_is_a_golden_prefix():
    assert epoch_order(0, 1, 5).tolist() == [1, 4, 3, 0, 2]
    assert epoch_order(0, 1, 60_000)[:5].tolist() == [48620, 20956, 45422, 160, 38118]
    assert epoch_order(7, 3, 60_000)[:5].tolist() == [50120, 55566, 44629, 5543, 18122]


@given(st.integers(0, 2**32 - 1), st.integers(1, 100), st.integers(1, 300))
def test_every_order_is_a_permutation(seed, epoch, num_examples):
    assert np.array_equal(np.sort(epoch_order(seed, epoch, num_examples)), np.arange(num_examples))


def test_no_two_epochs_or_seeds_share_an_order():
    orders = [tuple(epoch_order(seed, epoch, 100)) for seed in range(3) for epoch in range(1, 4)]
    assert all(first != second for first, second in itertools.combinations(orders, 2))


# Both sides take the examples in that order


def code(ids: np.ndarray) -> float:
    """Return a number that says which examples, at most 31, stand in a batch of at most 10, and in which order."""
    return float((ids + 1) @ 32.0 ** np.arange(len(ids)))


def jaxs_batches(counts: Counts, seed: int, epoch: int, steps_per_call: int) -> list[float]:
    """Return the code of each batch that the compiled epoch takes, its span cut into calls."""
    with jax_impl.programs.precision_scope("float64"):

        def train_step(state, images, labels, key, **_):
            return state._replace(params=state.params + 1), StepMetrics(
                (images + 1) @ 32.0 ** jnp.arange(len(images)), labels[0]
            )

        ids = np.arange(counts.num_examples)
        split = DeviceSplit(jnp.asarray(ids, float), jnp.asarray(ids, jnp.int32))
        order = jnp.asarray(epoch_order(seed, epoch, counts.num_examples), jnp.int32)
        run_steps = jax.jit(make_run_steps(train_step, counts))
        state, codes = TrainState(jnp.zeros(()), {}, ()), np.zeros(counts.steps_per_epoch)
        for start in range(0, counts.steps_per_epoch, steps_per_call):
            stop = min(start + steps_per_call, counts.steps_per_epoch)
            span = Span(np.int32(epoch), np.int32(start), np.int32(stop))
            state, metrics, _ = run_steps(state, split, order, span, np.uint32(seed))
            codes[start:stop] = metrics.loss[start:stop]
        assert state.params == counts.steps_per_epoch
        return codes.tolist()


def torchs_batches(counts: Counts, seed: int, epoch: int) -> Iterator[float]:
    ids = torch.arange(counts.num_examples)
    order = epoch_order(seed, epoch, counts.num_examples)
    for images, labels in torch_ref.data.batches(TensorDataset(ids.double(), ids), counts, order):
        assert torch.equal(images, labels.double())
        yield code(images.numpy())


@settings(deadline=None, max_examples=8)
@given(
    num_examples=st.integers(10, 31),
    batch_size=st.integers(1, 10),
    last_batch=st.sampled_from(["keep", "drop"]),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(1, 9),
    steps_per_call=st.integers(1, 31),
)
def test_torchs_loader_and_our_epoch_take_the_same_examples_in_the_same_batches(
    num_examples, batch_size, last_batch, seed, epoch, steps_per_call
):
    counts = count(dataclasses.replace(MLP128, batch_size=batch_size, last_batch=last_batch), num_examples)
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    used = num_examples if last_batch == "keep" else num_examples // batch_size * batch_size
    expected = [code(order[start : min(start + batch_size, used)]) for start in range(0, used, batch_size)]
    assert list(torchs_batches(counts, seed, epoch)) == expected
    assert jaxs_batches(counts, seed, epoch, steps_per_call) == expected


@pytest.mark.parametrize("side", TRAINERS)
def test_both_trainers_refuse_a_batch_larger_than_the_data(side):
    with pytest.raises(RecipeError, match="batch_size 128 is larger than the training split of 23 examples"):
        TRAINERS[side](MLP128, DATASETS["images"])


# A whole run is the plain loop. Class 4 of the images is in neither split, and no two dimensions are equal.


def made_up(shape: tuple[int, ...], classes: int, labels: int) -> Dataset:
    """Return 23 training and 11 test examples of `classes` classes, the first `labels` of which are there."""
    generator = np.random.default_rng(5)
    inputs = generator.integers(0, 256, (34, *shape)).astype(np.uint8 if len(shape) == 3 else np.float64)
    drawn = generator.integers(0, labels, 34).astype(np.int32)
    train, test = Split(inputs[:23], drawn[:23]), Split(inputs[23:], drawn[23:])
    return Dataset(name="made_up", train=train, test=test, class_names=tuple("abcdefg"[:classes]))


DATASETS = {"images": made_up((5, 6, 2), 5, 4), "table": made_up((7,), 2, 2)}


def small(name: str, *, hidden_sizes: tuple[int, ...] = (6,), batch_size: int = 5, **changes: object) -> Recipe:
    loaded = recipe.load(name)
    changes |= {"model": dataclasses.replace(loaded.model, hidden_sizes=hidden_sizes)}
    shared = {"epochs": 3, "batch_size": batch_size, "precision": "float64", "seed": 1}
    return dataclasses.replace(loaded, **(shared | changes))


def with_sum(of: Recipe) -> Recipe:
    return dataclasses.replace(of, loss=dataclasses.replace(of.loss, reduction="sum"))


NORMALIZED = recipe.load("cnn").preprocessing
RUNS = {
    "last batch kept, steps of the rate": (
        small(
            "mlp128",
            last_batch="keep",
            schedule=Schedule(name="step", step_epochs=2, gamma=0.1),
            preprocessing=NORMALIZED,
        ),
        "images",
    ),
    "last batch dropped, sum, cosine, nesterov, decay, batchnorm": (
        with_sum(
            small(
                "mlp128-batchnorm",
                last_batch="drop",
                batch_size=4,
                schedule=Schedule(name="cosine", final_learning_rate=0.001),
                optimizer=Optimizer(
                    name="sgd", learning_rate=0.01, weight_decay=0.1, momentum=0.7, dampening=0.0, nesterov=True
                ),
            )
        ),
        "images",
    ),
    "binary, last batch kept, adam": (
        small("breast-cancer", last_batch="keep", optimizer=recipe.load("mnist-mlp256").optimizer),
        "table",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run: each step's loss and right answers, each epoch's test losses and right answers, and both states."""

    start: dict[str, np.ndarray]
    steps: list[tuple[float, int]]
    tests: list[tuple[np.ndarray, np.ndarray]]
    end: dict[str, np.ndarray]

    @property
    def losses(self) -> dict[str, np.ndarray]:
        """Return the mean loss of each step's batch, and of each epoch the loss of each test example."""
        return {"losses": np.array([loss for loss, _ in self.steps])} | {
            f"test{epoch}": losses for epoch, (losses, _) in enumerate(self.tests, start=1)
        }


@functools.cache
def oracles_run(name: str) -> Run:
    """Run the plain loop: the specified order, cut into batches, a step of the oracle for each."""
    loaded, dataset = RUNS[name][0], DATASETS[RUNS[name][1]]
    (train, labels), (test, test_labels) = (
        normalized(loaded, dataset, split) for split in (dataset.train, dataset.test)
    )
    num_examples, batch_size = len(labels), loaded.batch_size
    used = num_examples if loaded.last_batch == "keep" else num_examples // batch_size * batch_size
    network = Network(
        recipe=loaded,
        input_shape=dataset.input_shape,
        outputs=params.num_outputs(loaded, dataset.num_classes),
        steps_per_epoch=len(range(0, used, batch_size)),
    )
    adapter = OracleAdapter(network)
    start, steps, tests = adapter.state(), [], []
    for epoch in range(1, loaded.epochs + 1):
        order = np.random.default_rng([loaded.seed, epoch]).permutation(num_examples)
        for first in range(0, used, batch_size):
            batch = order[first : min(first + batch_size, used)]
            steps.append(adapter.step(train[batch], labels[batch]))
        losses, predictions = adapter.evaluate(test, test_labels)
        tests.append((losses, predictions == test_labels))
    return Run(start=start, steps=steps, tests=tests, end=adapter.state())


def normalized(of: Recipe, dataset: Dataset, split: Split) -> Split:
    """Return the split as S1.6 and S1.7 say."""
    given = of.preprocessing
    if given.standardize:
        columns = dataset.train.inputs
        return Split(((split.inputs - columns.mean(axis=0)) / columns.std(axis=0)).astype(np.float32), split.labels)
    divisor, mean, std = map(np.float32, (given.divisor, given.mean, given.std))
    return Split((split.inputs.astype(np.float32) / divisor - mean) / std, split.labels)


@functools.cache
def trained(side: str, name: str) -> tuple[Run, list[StepsDone | EpochDone]]:
    """Return that side's run, two steps in a call, and its events."""
    trainer = TRAINERS[side](RUNS[name][0], DATASETS[RUNS[name][1]])
    start, events = trainer.state(), list(trainer.events(pace=Pace(steps=2)))
    done = [event for event in events if isinstance(event, StepsDone)]
    steps = [(loss, correct) for event in done for loss, correct in zip(event.losses, event.num_correct, strict=True)]
    tests = [(event.test_losses, event.test_correct) for event in events if isinstance(event, EpochDone)]
    return Run(start=start, steps=steps, tests=tests, end=trainer.state()), events


def bound_of(name: str) -> float:
    loaded, dataset = RUNS[name][0], DATASETS[RUNS[name][1]]
    leaves = params.leaves(loaded.model, dataset.input_shape, params.num_outputs(loaded, dataset.num_classes))
    return run_bound(leaves, loaded.batch_size, len(oracles_run(name).steps), np.float64)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("side", TRAINERS)
def test_every_run_starts_from_the_specified_bits(side, name):
    expected = oracles_run(name).start
    assert_identical(trained(side, name)[0].start, expected, item=f"{side}, {name}")
    assert all(np.array_equal(array, array.astype(np.float32)) for array in expected.values())


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("side", TRAINERS)
def test_a_whole_run_is_the_plain_loop_over_the_specified_batches(side, name):
    (run, events), expected = trained(side, name), oracles_run(name)
    assert len(run.steps) == len(expected.steps) > 9
    assert_within(run.losses, expected.losses, bound=bound_of(name), item=f"{side}, {name}", relative_to_layer=True)
    assert_within(run.end, expected.end, bound=bound_of(name), item=f"{side}, {name}", relative_to_layer=True)
    assert [correct for _, correct in run.steps] == [correct for _, correct in expected.steps]
    assert all((run.end[leaf] != run.start[leaf]).any() for leaf in run.end)
    spans = [(event.epoch, event.start, event.stop) for event in events if isinstance(event, StepsDone)]
    steps = len(expected.steps) // 3
    assert spans == [(epoch, first, min(first + 2, steps)) for epoch in (1, 2, 3) for first in range(0, steps, 2)]
