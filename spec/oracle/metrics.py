"""Accuracy, and the mean over examples (S8)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of right answers among the examples, both int [n]. Raises ValueError for other shapes.

    >>> accuracy([1, 2, 3, 3], [1, 2, 3, 0])
    0.75
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise ValueError(f"predictions have shape {predictions.shape} and labels {labels.shape}; both must be [n]")
    return float((predictions == labels).mean())


def weighted_mean(values: ArrayLike, sizes: ArrayLike) -> float:
    """Return the mean over examples, sum_b n_b v_b / sum_b n_b, of the batches' means v and sizes n, both [batches].

    The plain mean of the means counts an example of a short batch for more than one.

    >>> weighted_mean([0.5, 1.0], [3, 1])
    0.625
    """
    values, sizes = np.asarray(values, np.float64), np.asarray(sizes, np.float64)
    return float(values @ sizes / sizes.sum())
