"""S2: the order of an epoch, the number of steps, the size of the last batch."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec import recipe
from spec.batches import count, epoch_order
from spec.errors import RecipeError

MLP128 = recipe.load("mlp128")


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
    with pytest.raises(RecipeError, match=r"batch_size 128 is larger than .* 100 examples; use --batch-size 100"):
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
