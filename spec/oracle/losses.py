"""The losses, their gradients by the logits, and the predictions (S4, S5, S8)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from spec.oracle.functions import log_softmax, sigmoid, softmax
from spec.recipe import Loss


def example_losses(logits: ArrayLike, labels: ArrayLike, loss: Loss) -> np.ndarray:
    """Return the loss of each example, float64 [batch], in nats, for logits z [batch, outputs] and int labels [batch].

    cross_entropy: -sum_k q_k log softmax(z)_k with q = (1-e) onehot(y) + e/K; cross_entropy_of_softmax: the same with
    softmax(z) in the place of z; binary_cross_entropy: log(1 + exp(-z)) where y = 1 and log(1 + exp(z)) where y = 0.
    Raises ValueError for a label that is not a class, and for binary cross-entropy of other than one logit.
    """
    logits = np.asarray(logits, np.float64)
    targets = _targets(logits, labels, loss)
    if loss.name == "binary_cross_entropy":
        return np.logaddexp(0.0, (1 - 2 * targets[:, 1]) * logits[:, 0])
    if loss.name == "cross_entropy_of_softmax":
        logits = softmax(logits)
    return -(targets * log_softmax(logits)).sum(axis=-1)


def loss_gradient(logits: ArrayLike, labels: ArrayLike, loss: Loss) -> np.ndarray:
    """Return the gradient of the reduced loss by the logits, float64 [batch, outputs]; a mean divides by the batch.

    Of one example: softmax(z) - q; through the second softmax, with p = softmax(z) and g = softmax(p) - q,
    p_k (g_k - sum_j p_j g_j); binary: sigmoid(z) - y. Raises ValueError as `example_losses` does.
    """
    logits = np.asarray(logits, np.float64)
    targets = _targets(logits, labels, loss)
    if loss.name == "binary_cross_entropy":
        grad = sigmoid(logits) - targets[:, 1:]
    elif loss.name == "cross_entropy":
        grad = softmax(logits) - targets
    else:
        inner = softmax(logits)
        outer = softmax(inner) - targets
        grad = inner * (outer - (inner * outer).sum(axis=-1, keepdims=True))
    return grad / len(logits) if loss.reduction == "mean" else grad


def predictions(logits: ArrayLike) -> np.ndarray:
    """Return the class with the largest logit, int64 [batch], the first of equals; of one logit: is it over 0.

    >>> predictions([[1, 3, 3], [2, 0, 1]]).tolist(), predictions([[0.0], [0.1]]).tolist()
    ([1, 0], [0, 1])
    """
    logits = np.asarray(logits)
    return (logits[:, 0] > 0).astype(np.int64) if logits.shape[1] == 1 else logits.argmax(axis=1)


def _targets(logits: np.ndarray, labels: ArrayLike, loss: Loss) -> np.ndarray:
    """Return q = (1-e) onehot(y) + e/K, [batch, classes]; one logit has two classes."""
    labels = np.asarray(labels)
    binary = loss.name == "binary_cross_entropy"
    if binary and logits.shape[1] != 1:
        raise ValueError(f"binary_cross_entropy takes 1 logit an example; these logits have {logits.shape[1]}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels have shape {labels.shape}; {len(logits)} examples need ({len(logits)},)")
    classes = 2 if binary else logits.shape[1]
    wrong = ~np.isin(labels, np.arange(classes))
    if wrong.any():
        raise ValueError(f"label {labels[wrong][0]} is not a class; labels are integers from 0 to {classes - 1}")
    one_hot = np.eye(classes)[labels.astype(np.int64)]
    return (1 - loss.label_smoothing) * one_hot + loss.label_smoothing / classes
