"""Backpropagation by hand through the lesson's two-layer binary net: forward, the lesson's slip, differences, training.

Weights are [in, out] here, as the lesson writes them, in the order W1 [features, hidden], b1 [hidden], W2 [hidden, 1],
b2 [1]; the closed form of their gradients is `spec.oracle.two_layer_binary_gradients` (S5.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from spec import batches, oracle

Weights = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Reduction = Literal["mean", "sum"]
Gradients = Callable[..., Sequence[np.ndarray]]


class Passed(NamedTuple):
    """What the net makes of a batch: hidden h [n, hidden], logits z [n, 1], probabilities sigma [n, 1]."""

    hidden: np.ndarray
    logits: np.ndarray
    sigma: np.ndarray


def forward(weights: Weights, x: np.ndarray) -> Passed:
    """Return h = S(x W1 + b1), z = h W2 + b2 and sigma = S(z) for `x` [n, features], S the sigmoid."""
    w1, b1, w2, b2 = weights
    hidden = oracle.sigmoid(x @ w1 + b1)
    logits = hidden @ w2 + b2
    return Passed(hidden, logits, oracle.sigmoid(logits))


def loss(weights: Weights, x: np.ndarray, y: np.ndarray, reduction: Reduction) -> float:
    """Return the binary cross-entropy of `y` [n] of 0 and 1, in nats: log(1 + exp(z)) - y z, its sum or mean."""
    logits = forward(weights, x).logits[:, 0]
    losses = np.logaddexp(0, logits) - y * logits
    return float(losses.sum() if reduction == "sum" else losses.mean())


def slipped_gradients(
    w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray, x: np.ndarray, y: np.ndarray, reduction: Reduction
) -> Weights:
    """Return the gradients as the lesson prints them: wrong, with sigma (1 - sigma) where h (1 - h) belongs.

    sigma is the output's [n, 1] and h the hidden layer's [n, hidden]: NumPy spreads the one over the other's shape and
    says nothing. The gradients of the output layer are right.
    """
    hidden, _, sigma = forward((w1, b1, w2, b2), x)
    error = sigma - y[:, None]
    if reduction == "mean":
        error = error / len(y)
    hidden_error = (error @ w2.T) * sigma * (1 - sigma)
    return x.T @ hidden_error, hidden_error.sum(axis=0), hidden.T @ error, error.sum(axis=0)


def numerical_gradients(
    weights: Weights, x: np.ndarray, y: np.ndarray, reduction: Reduction, *, step: float = 6e-6
) -> Weights:
    """Return (L(w + e) - L(w - e)) / 2e for every weight by itself, e = `step`: two forward passes a weight.

    The error is e^2 L''' / 6 of the formula and about u L / e of rounding; together they are least near the cube root
    of u, 1.1e-16, which is the default.
    """

    def slope(index: int, place: tuple[int, ...]) -> float:
        moved = [np.array(weight) for weight in weights]
        moved[index][place] += step
        above = loss(tuple(moved), x, y, reduction)
        moved[index][place] -= 2 * step
        return (above - loss(tuple(moved), x, y, reduction)) / (2 * step)

    return tuple(
        np.array([slope(index, place) for place in np.ndindex(weight.shape)]).reshape(weight.shape)
        for index, weight in enumerate(weights)
    )


def relative_errors(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> list[float]:
    """Return for each array the largest |found - wanted|, over the largest |wanted| of that array."""
    return [float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in zip(found, wanted, strict=True)]


def train(
    gradients: Gradients, weights: Weights, x: np.ndarray, y: np.ndarray, *, rate: float, batch_size: int, epochs: int
) -> tuple[Weights, np.ndarray]:
    """Return the weights after `epochs` of plain descent, and the mean loss before the first and after each.

    `gradients` is called as `spec.oracle.two_layer_binary_gradients` is, with the reduction "mean". The order of the
    examples is that of seed 0 (S2).
    """
    losses = [loss(weights, x, y, "mean")]
    for epoch in range(1, epochs + 1):
        order = batches.epoch_order(0, epoch, len(x))
        for start in range(0, len(x), batch_size):
            chosen = order[start : start + batch_size]
            grads = gradients(*weights, x[chosen], y[chosen], "mean")
            weights = tuple(weight - rate * grad for weight, grad in zip(weights, grads, strict=True))
        losses.append(loss(weights, x, y, "mean"))
    return weights, np.array(losses)
