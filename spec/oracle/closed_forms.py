"""The gradients as the lessons derive them on paper, each written out whole: what the general way back must agree with.

Source: the lessons' derivations for softmax regression and for the two-layer binary net (S5).
"""

from __future__ import annotations

from typing import Literal

import numpy as np


def softmax_regression_gradients(
    weight: np.ndarray, bias: np.ndarray, inputs: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return dL/dW = (P - Y)^T X / n and dL/db = sum (P - Y) / n of the mean cross-entropy, P = softmax(X W^T + b).

    `weight` is [classes, features], as torch keeps it, `bias` [classes], `inputs` [n, features], `labels` int [n]; Y
    has a 1 at each label. The gradients have the shapes of `weight` and `bias`.
    """
    logits = inputs @ weight.T + bias
    scores = np.exp(logits - logits.max(axis=1)[:, None])
    error = scores / scores.sum(axis=1)[:, None]
    error[np.arange(len(labels)), labels] -= 1
    return error.T @ inputs / len(labels), error.sum(axis=0) / len(labels)


def two_layer_binary_gradients(
    w1: np.ndarray,
    b1: np.ndarray,
    w2: np.ndarray,
    b2: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    reduction: Literal["mean", "sum"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients by W1, b1, W2, b2 of the binary cross-entropy of sigma = S(h W2 + b2), h = S(x W1 + b1).

    S(z) = 1 / (1 + exp(-z)). dL/dW2 = h^T (sigma - y); dL/dW1 = x^T [((sigma - y) W2^T) h (1 - h)], with the hidden
    layer's h and not the output's sigma; for a bias, the sum over the batch of what follows the transpose.
    Here weights are [in, out], as the lesson writes them: `w1` [features, hidden], `w2` [hidden, 1], `x` [n, features],
    `y` [n] of 0 and 1. The gradients have the shapes of what they belong to.
    """
    h = 1 / (1 + np.exp(-(x @ w1 + b1)))
    sigma = 1 / (1 + np.exp(-(h @ w2 + b2)))
    error = sigma - y[:, None]
    if reduction == "mean":
        error = error / len(y)
    hidden_error = (error @ w2.T) * h * (1 - h)
    return x.T @ hidden_error, hidden_error.sum(axis=0), h.T @ error, error.sum(axis=0)
