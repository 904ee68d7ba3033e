"""What a mini-batch's gradient is off that of all the data: measured, and as statistics say (softmax regression)."""

from __future__ import annotations

import math

import numpy as np

from spec import batches, oracle


def flat_gradient(weight: np.ndarray, bias: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mean cross-entropy's gradient by `weight` [classes, features] and `bias` [classes], as one vector."""
    by_weight, by_bias = oracle.softmax_regression_gradients(weight, bias, inputs, labels)
    return np.concatenate([by_weight.ravel(), by_bias])


def squared_distances(
    weight: np.ndarray,
    bias: np.ndarray,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    draws: int,
    seed: int,
) -> np.ndarray:
    """Return |g_B - g|^2 of `draws` batches, each `batch_size` different examples of `inputs` [n, features]: [draws].

    g is the gradient over all n examples; each batch is the beginning of an order of its own, drawn from `seed`.
    """
    whole = flat_gradient(weight, bias, inputs, labels)
    distances = []
    for draw in range(1, draws + 1):
        chosen = batches.epoch_order(seed, draw, len(inputs))[:batch_size]
        distances.append(np.sum((flat_gradient(weight, bias, inputs[chosen], labels[chosen]) - whole) ** 2))
    return np.array(distances)


def spread(weight: np.ndarray, bias: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> float:
    """Return the standard deviation of one example's gradient, the root of the mean of |g_i - g|^2 over all examples.

    An example's gradient is (p - onehot(y)) times its inputs and 1, so |g_i|^2 = |p - onehot(y)|^2 (|x|^2 + 1), and
    the mean of |g_i - g|^2 is that of |g_i|^2 less |g|^2: no gradient of one example has to be made.
    """
    error = oracle.softmax(inputs @ weight.T + bias)
    error[np.arange(len(labels)), labels] -= 1
    squares = (error**2).sum(axis=1) * ((inputs**2).sum(axis=1) + 1)
    return math.sqrt(squares.mean() - np.sum(flat_gradient(weight, bias, inputs, labels) ** 2))


def expected_deviation(one: float, batch_size: int, num_examples: int) -> float:
    """Return the standard deviation of the mean of `batch_size` of `num_examples` values, drawn without putting back.

    one / sqrt(batch) times sqrt((n - batch) / (n - 1)), for a batch of all the examples is not off at all; `one` is the
    standard deviation of a single value.

    >>> expected_deviation(6.0, 4, 1_000_000_000), expected_deviation(6.0, 4, 4)
    (2.9999999955, 0.0)
    """
    return one / math.sqrt(batch_size) * math.sqrt((num_examples - batch_size) / (num_examples - 1))
