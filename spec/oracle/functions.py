"""Softmax and sigmoid in their stable forms."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def softmax(logits: ArrayLike) -> np.ndarray:
    """Return exp(z_k) / sum_j exp(z_j) over the last axis, float64 of the shape of `logits`.

    The largest logit is subtracted first, so nothing overflows.

    >>> softmax([1000, 1000]).tolist()
    [0.5, 0.5]
    """
    exponentials = np.exp(_shifted(logits))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def log_softmax(logits: ArrayLike) -> np.ndarray:
    """Return z_k - log sum_j exp(z_j) over the last axis, float64 of the shape of `logits`."""
    shifted = _shifted(logits)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def sigmoid(logits: ArrayLike) -> np.ndarray:
    """Return 1 / (1 + exp(-z)), float64 of the shape of `logits`; only exponentials of negative numbers are taken.

    >>> sigmoid([-1000, 0, 1000]).tolist()
    [0.0, 0.5, 1.0]
    """
    logits = np.asarray(logits, np.float64)
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1 + small)


def _shifted(logits: ArrayLike) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits - logits.max(axis=-1, keepdims=True)
