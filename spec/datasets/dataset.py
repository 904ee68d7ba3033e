"""A data set in memory, as NumPy arrays, and its preprocessing on the host (S1)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from spec.errors import DataError
from spec.recipe import Preprocessing


class Split(NamedTuple):
    """Inputs [n, height, width, channels] or [n, features] of any number type, and labels [n] int32."""

    inputs: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A training split, a test split where there is one, and the name of each class."""

    name: str
    train: Split
    test: Split | None
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Return how many classes there are."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of one example."""
        return self.train.inputs.shape[1:]


def preprocess(dataset: Dataset, preprocessing: Preprocessing) -> Dataset:
    """Return the data set with float32 inputs: ((x / divisor) - mean) / std, in this order and in float32 (S1).

    `standardize` then gives every column mean 0 and population standard deviation 1 over the training split; a
    constant column is only centred. It works in float64 throughout, so that a column's offset does not swallow its
    differences, and is rounded once. Raises DataError when a value overflows float32.
    """
    dtype = np.float64 if preprocessing.standardize else np.float32

    def normalize(split: Split) -> Split:
        unit = split.inputs.astype(dtype) / dtype(preprocessing.divisor)
        return Split((unit - dtype(preprocessing.mean)) / dtype(preprocessing.std), split.labels)

    with np.errstate(over="ignore", invalid="ignore"):
        train = normalize(dataset.train)
        test = normalize(dataset.test) if dataset.test else None
        if preprocessing.standardize:
            mean, std = train.inputs.mean(axis=0), train.inputs.std(axis=0)
            std = np.where(std > 0, std, 1)
            train = _standardize(train, mean, std)
            test = _standardize(test, mean, std) if test else None
    if not all(np.isfinite(split.inputs).all() for split in (train, test) if split):
        raise DataError(f"{dataset.name} has values that overflow float32 after preprocessing; scale them down")
    return replace(dataset, train=train, test=test)


def sha256(dataset: Dataset) -> str:
    """Return the sha256 of the inputs and the labels of both splits."""
    whole = hashlib.sha256()
    for split in filter(None, (dataset.train, dataset.test)):
        for array in split:
            whole.update(f"{array.dtype}{array.shape}".encode())
            whole.update(np.ascontiguousarray(array).data)
    return whole.hexdigest()


def value_table(preprocessing: Preprocessing) -> np.ndarray | None:
    """Return what `preprocess` makes of each byte, float32 [256]; None where that depends on all of them (standardize).

    Raises DataError when a value overflows float32.
    """
    if preprocessing.standardize:
        return None
    every = Split(np.arange(256, dtype=np.uint8), np.zeros(256, np.int32))
    table = Dataset(name="uint8 data", train=every, test=None, class_names=())
    return preprocess(table, preprocessing).train.inputs


def _standardize(split: Split, mean: np.ndarray, std: np.ndarray) -> Split:
    return Split(((split.inputs - mean) / std).astype(np.float32), split.labels)
