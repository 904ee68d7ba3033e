"""The sizes of the data sets that are known without reading them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spec.datasets.catalog import IDX_SETS, NUM_CLASSES
from spec.datasets.dataset import Dataset
from spec.recipe import Data

_TABLES = {"digits": (1_797, (8, 8, 1), 10), "breast_cancer": (569, (30,), 2)}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Training and test examples, the shape and the number type of one, and the number of classes."""

    num_train: int
    num_test: int
    input_shape: tuple[int, ...]
    input_dtype: np.dtype
    num_classes: int


def size_of(dataset: Dataset) -> Size:
    """Return the size of a data set that is there."""
    return Size(
        num_train=len(dataset.train.labels),
        num_test=len(dataset.test.labels) if dataset.test else 0,
        input_shape=dataset.input_shape,
        input_dtype=dataset.train.inputs.dtype,
        num_classes=dataset.num_classes,
    )


def known_size(data: Data) -> Size | None:
    """Return the size of the data set, or None where only the user's file tells."""
    if idx_set := IDX_SETS.get(data.name):
        train, _, test, _ = idx_set.files
        return Size(
            num_train=train.shape[0],
            num_test=test.shape[0],
            input_shape=(*train.shape[1:], 1),
            input_dtype=np.dtype(np.uint8),
            num_classes=NUM_CLASSES,
        )
    if data.name == "synthetic":
        examples, input_shape, num_classes = data.num_examples, (data.num_features,), data.num_classes
    elif data.name in _TABLES:
        examples, input_shape, num_classes = _TABLES[data.name]
    else:
        return None
    num_test = num_held_out(examples, data.test_fraction)
    return Size(
        num_train=examples - num_test,
        num_test=num_test,
        input_shape=input_shape,
        input_dtype=np.dtype(np.float64),
        num_classes=num_classes,
    )


def num_held_out(num_examples: int, test_fraction: float) -> int:
    """Return how many examples are held out for testing: round(n * fraction)."""
    return round(num_examples * test_fraction)
