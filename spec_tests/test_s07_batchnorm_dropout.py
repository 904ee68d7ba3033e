"""S7: BatchNorm with torch's running variance, and dropout."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_impl import models
from jax_impl.convert import from_canonical
from jax_impl.layers import BatchNorm, normalize_batch
from jax_impl.trainer import precision_scope
from spec import params, recipe


def norm(channels: int) -> BatchNorm:
    graphdef, state = nnx.split(BatchNorm(channels))
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))


def test_training_normalises_by_the_biased_variance_and_runs_the_unbiased_one():
    batches = np.random.default_rng(0).standard_normal((3, 4, 5, 2, 3)) * 3 + 7
    with precision_scope("float64"):
        layer = norm(3)
        mean, var = np.zeros(3), np.ones(3)
        for batch in batches:
            axes, count = (0, 1, 2), 4 * 5 * 2
            out = layer(jnp.asarray(batch), train=True)
            expected = (batch - batch.mean(axes)) / np.sqrt(batch.var(axes) + 1e-5)
            assert np.abs(out - expected).max() < 1e-13
            mean = 0.9 * mean + 0.1 * batch.mean(axes)
            var = 0.9 * var + 0.1 * batch.var(axes) * count / (count - 1)
        assert np.abs(layer.mean[...] - mean).max() < 1e-14
        assert np.abs(layer.var[...] - var).max() < 1e-14
        held = layer(jnp.asarray(batches[0]), train=False)
        assert np.abs(held - (batches[0] - mean) / np.sqrt(var + 1e-5)).max() < 1e-13
        assert np.abs(layer.var[...] - var).max() < 1e-14  # evaluation leaves the statistics alone


def test_the_gradient_is_that_of_the_equation_by_central_differences():
    generator = np.random.default_rng(0)
    x, weight = generator.standard_normal((2, 6, 3))
    scale, bias = generator.standard_normal((2, 3))

    def loss(x, scale, bias):
        normalized = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
        return ((normalized * scale + bias) * weight).sum()

    with precision_scope("float64"):
        grads = jax.grad(lambda *arguments: (normalize_batch(*arguments)[0] * weight).sum(), argnums=(0, 1, 2))(
            *map(jnp.asarray, (x, scale, bias))
        )
    step = 1e-6
    for index, grad in enumerate(map(np.asarray, grads)):
        for position in np.ndindex(grad.shape):
            values = [x, scale, bias]
            sides = []
            for sign in (1, -1):
                moved = values[index].copy()
                moved[position] += sign * step
                sides.append(loss(*values[:index], moved, *values[index + 1 :]))
            # Central differences are right to step^2 and to eps / step: 1e-12 and 2e-10, times the loss's size.
            assert grad[position] == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-8)


def test_a_large_offset_does_not_cancel_the_variance():
    values = (1e4 + np.random.default_rng(0).standard_normal((256, 1))).astype(np.float32)
    layer = BatchNorm(1)
    layer(jnp.asarray(values), train=True)
    unbiased = values.astype(np.float64).var(ddof=1)
    assert float(layer.var[0]) == pytest.approx(0.9 + 0.1 * unbiased, rel=1e-4)


def test_a_bfloat16_batch_keeps_float32_statistics():
    layer = BatchNorm(2)
    out = layer(jnp.ones((8, 2), jnp.bfloat16) * jnp.arange(8, dtype=jnp.bfloat16)[:, None], train=True)
    assert out.dtype == jnp.bfloat16
    assert layer.var[...].dtype == layer.mean[...].dtype == jnp.float32


def test_the_input_batchnorm_has_one_channel_over_all_pixels():
    model = recipe.load("mlp128-batchnorm").model
    leaves = params.leaves(model, (4, 4, 1), 3)
    state = params.initial_state(leaves, recipe.load("mlp128").init, 0)
    trained, statistics = from_canonical(state, leaves, dtype=jnp.float32, device=jax.devices("cpu")[0])
    images = np.random.default_rng(0).random((6, 4, 4, 1)).astype(np.float32)
    _, after = models.apply(models.graph(model, (4, 4, 1), 3), trained, statistics, jnp.asarray(images), train=True)
    assert float(after["norm0"]["mean"][0]) == pytest.approx(0.1 * images.mean(), rel=1e-6)
    assert float(after["norm0"]["var"][0]) == pytest.approx(0.9 + 0.1 * images.var(ddof=1), rel=1e-6)


# Dropout


@pytest.fixture(scope="module")
def cnn():
    model = dataclasses.replace(recipe.load("cnn").model, channels=(4,), hidden_sizes=(256,))
    leaves = params.leaves(model, (4, 4, 1), 3)
    state = params.initial_state(leaves, recipe.load("mlp128").init, 0)
    state["linear2.weight"][:] = 1  # the output is the sum of what dropout let through
    state["norm2.bias"][:] = 1
    state["norm2.weight"][:] = 0
    state["linear2.bias"][:] = 0
    trained, statistics = from_canonical(state, leaves, dtype=jnp.float32, device=jax.devices("cpu")[0])
    graph = models.graph(model, (4, 4, 1), 3)
    images = jnp.asarray(np.random.default_rng(0).random((50, 4, 4, 1)), jnp.float32)

    def logits(key: int | None) -> np.ndarray:
        train = key is not None
        dropout_key = jax.random.key(key) if train else None
        found, _ = models.apply(graph, trained, statistics, images, train=train, dropout_key=dropout_key)
        return np.asarray(found)[:, 0]

    return logits


def test_kept_units_are_scaled_by_one_over_the_keeping_rate_and_their_share_is_right(cnn):
    # 256 units of value 1: the sum is k / 0.6 for k kept ones, k ~ Binomial(256, 0.6) in each of 50 rows.
    kept = cnn(0) * 0.6
    assert np.abs(kept - np.round(kept)).max() < 1e-3
    n = 50 * 256
    assert abs(kept.sum() - 0.6 * n) < 5 * np.sqrt(n * 0.6 * 0.4)


def test_another_key_gives_another_mask_and_the_same_key_the_same(cnn):
    assert np.array_equal(cnn(1), cnn(1))
    assert not np.array_equal(cnn(1), cnn(2))


def test_evaluation_drops_nothing(cnn):
    assert cnn(None).tolist() == [256.0] * 50
