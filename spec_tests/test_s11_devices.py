"""S11: what depends on the global batch alone, however it is cut: gradients, figures, BatchNorm's statistics."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from spec import params, recipe
from spec.recipe import Loss
from spec_tests.adapters import ADAPTERS, Adapter, Arrays, Network
from spec_tests.assertions import assert_error_ratio, assert_within, largest_difference
from spec_tests.tolerances import chain_bound, sum_bound

SHARDS = (slice(0, 7), slice(7, 10))
SIZES = (7, 3)
BATCH = 10
OURS = ("jax", "torch")


@functools.cache
def adapter(name: str, *, reduction: str = "mean", precision: str = "float64", norm: bool = False) -> Adapter:
    plain = recipe.load("softmax-regression")
    changed = dataclasses.replace(
        plain,
        precision=precision,
        model=dataclasses.replace(plain.model, input_batchnorm=norm),
        loss=Loss(name="cross_entropy", reduction=reduction, label_smoothing=0.0),
    )
    return ADAPTERS[name](Network(recipe=changed, input_shape=(3, 2, 2), outputs=4))


def global_batch() -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels whose shards differ in mean and spread."""
    generator = np.random.default_rng(5)
    grows = np.linspace(0.5, 3, BATCH)[:, None, None, None]
    images = generator.standard_normal((BATCH, 3, 2, 2)) * grows + grows
    return images.astype(np.float32), generator.integers(0, 4, BATCH)


def of_shards(side: Adapter) -> list[Arrays]:
    images, labels = global_batch()
    return [side.gradients(images[shard], labels[shard]) for shard in SHARDS]


def combined(parts: list[Arrays], weights: list[float]) -> Arrays:
    return {name: sum(w * part[name] for w, part in zip(weights, parts, strict=True)) for name in parts[0]}


@pytest.mark.parametrize("name", OURS)
def test_gradients_of_unequal_shards_are_weighted_by_their_sizes(name):
    side = adapter(name)
    whole, parts = side.gradients(*global_batch()), of_shards(side)
    truth = adapter("oracle").gradients(*global_batch())
    bound = chain_bound(side.network.leaves, BATCH, np.float64)
    weighted = combined(parts, [size / BATCH for size in SIZES])
    for found in (whole, weighted):
        assert_within(found, truth, bound=bound, item=name, relative_to_layer=True)
    plain = combined(parts, [1 / len(SHARDS)] * len(SHARDS))
    with pytest.raises(AssertionError, match="off, allowed"):  # the weights matter
        assert_within(plain, truth, bound=bound, item=name, relative_to_layer=True)


@pytest.mark.parametrize("name", OURS)
def test_gradients_of_a_summed_loss_are_added_over_the_shards(name):
    side = adapter(name, reduction="sum")
    truth = adapter("oracle", reduction="sum").gradients(*global_batch())
    bound = chain_bound(side.network.leaves, BATCH, np.float64)
    added = combined(of_shards(side), [1.0] * len(SHARDS))
    assert_within(added, truth, bound=bound, item=name, relative_to_layer=True)


def test_in_float32_the_weighted_gradients_agree_by_the_rule():
    weights = [size / BATCH for size in SIZES]
    ours, theirs = (combined(of_shards(adapter(name, precision="float32")), weights) for name in OURS)
    assert_error_ratio(ours, theirs, adapter("oracle").gradients(*global_batch()), item="shards")


@pytest.mark.parametrize("name", OURS)
def test_losses_of_shards_are_weighted_by_their_sizes_and_right_answers_added(name):
    images, labels = global_batch()
    side = adapter(name)
    state, opt_state = side.state(), side.opt_state()

    def figures(part: slice) -> tuple[float, int]:
        side.load(state, opt_state)
        return side.step(images[part], labels[part])

    whole_loss, whole_correct = figures(slice(0, BATCH))
    losses, correct = zip(*map(figures, SHARDS), strict=True)
    side.load(state, opt_state)
    bound = chain_bound(side.network.leaves, BATCH, np.float64)
    assert abs(np.dot(losses, SIZES) / BATCH - whole_loss) <= bound * max(1, whole_loss)
    assert sum(correct) == whole_correct > 0
    assert len(set(losses)) == len(SHARDS)


@pytest.mark.parametrize("name", OURS)
def test_batchnorm_normalises_over_the_global_batch(name):
    images, _ = global_batch()
    side = adapter(name, norm=True)
    side.load(params.initial_state(side.network.leaves, side.network.recipe.init, 0), side.opt_state())
    wide = images.astype(np.float64)
    counts = np.array([wide[shard].size for shard in SHARDS])
    means = np.array([wide[shard].mean() for shard in SHARDS])
    variances = np.array([wide[shard].var() for shard in SHARDS])
    count = counts.sum()
    mean = counts @ means / count
    var = counts @ (variances + (means - mean) ** 2) / count
    passed = side.forward(images, train=True)
    bound = sum_bound(count, float(np.abs(wide).max()), np.float64)
    expected = {
        "norm0.running_mean": np.array([0.1 * mean]),
        "norm0.running_var": np.array([0.9 + 0.1 * var * count / (count - 1)]),
    }
    assert_within(passed.batch_stats, expected, bound=bound, item=name)
    normalized = ((wide - mean) / np.sqrt(var + 1e-5)).transpose(0, 3, 1, 2).reshape(BATCH, -1)
    assert_within({"norm0": passed.activations["norm0"]}, {"norm0": normalized}, bound=bound, item=name)
    alone = side.forward(images[SHARDS[0]], train=True).activations["norm0"]
    assert largest_difference({"norm0": alone}, {"norm0": normalized[SHARDS[0]]}) > bound  # a shard is no global batch
