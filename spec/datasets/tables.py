"""Data sets that are no idx files: digits, breast cancer, CSV, synthetic, and a user's own map-style object."""

from __future__ import annotations

import csv
import os
import pkgutil
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from spec.datasets.dataset import Dataset, Split
from spec.datasets.sizes import num_held_out
from spec.errors import DataError
from spec.files import expanded
from spec.recipe import Data

MAX_CLASSES = 65_536


def load_digits(data: Data) -> Dataset:
    """Return scikit-learn's 1,797 digits: images [n, 8, 8, 1] float64 in 0..16, which ship inside the package."""
    from sklearn.datasets import load_digits as load

    bunch = load()
    classes = tuple(str(name) for name in bunch.target_names)
    return held_out("digits", bunch.images[..., None], bunch.target, classes, data)


def load_breast_cancer(data: Data) -> Dataset:
    """Return scikit-learn's breast cancer table: [569, 30] float64, two classes."""
    from sklearn.datasets import load_breast_cancer as load

    bunch = load()
    classes = tuple(str(name) for name in bunch.target_names)
    return held_out("breast_cancer", bunch.data, bunch.target, classes, data)


def load_synthetic(data: Data) -> Dataset:
    """Return rows uniform in [0, high) and labels uniform over the classes, float64 [examples, features]."""
    generator = np.random.default_rng([data.seed, *b"synthetic"])
    inputs = generator.uniform(0, data.high, (data.num_examples, data.num_features))
    labels = generator.integers(0, data.num_classes, data.num_examples)
    classes = tuple(str(label) for label in range(data.num_classes))
    return held_out("synthetic", inputs, labels, classes, data)


def load_csv(data: Data) -> Dataset:
    """Return the table in the file `data.path`: numbers, the label in the last column, a header line if there is one.

    Labels are whole numbers; class k is the k-th smallest of them. Raises DataError naming the file and the row.
    """
    path = expanded(data.path)
    if data.path == "":
        raise DataError(
            "data.path is empty; name a CSV file: --data.path FILE for a trainer, data.path in a recipe file"
        )
    if not os.path.isfile(path):
        what = "is a directory" if os.path.isdir(path) else "does not exist"
        raise DataError(f"{path} {what}; name a CSV file with --data.path FILE")
    table = _read_table(path)
    if table.shape[1] < 2:
        raise DataError(f"{path} has one column; it needs one feature at least, and the label in the last column")
    _refuse(path, ~np.isfinite(table), table, "every value must be a finite number")
    labels = table[:, -1:]
    _refuse(path, labels != np.round(labels), labels, "the last column must hold whole-number labels")
    values, labels = np.unique(labels.ravel(), return_inverse=True)
    classes = tuple(str(int(value)) for value in values)
    return held_out("csv", table[:, :-1], labels, classes, data)


def load_map_style(data: Data) -> Dataset:
    """Return the map-style object that `data.path` names as `module:object`; a callable is called first."""
    if data.path == "":
        raise DataError("data.path is empty; name a data set with --data.path module:object")
    try:
        found = pkgutil.resolve_name(data.path)
        items = found() if callable(found) else found
    except Exception as error:
        raise DataError(
            f"data.path {data.path!r} gives no data set: {type(error).__name__}: {error}; write module:object, the "
            "module importable from here"
        ) from None
    return from_map_style(items, data)


def from_map_style(items: Any, data: Data) -> Dataset:
    """Return a data set from an object with `len(items)` and `items[i] -> (input, label)`; inputs keep their dtype.

    Inputs are arrays of one shape, [features] or [height, width, channels]; labels are integers from 0.
    """
    if not hasattr(items, "__len__") or not hasattr(items, "__getitem__"):
        raise DataError(f"a map-style data set has a length and items; {type(items).__name__} has not")
    if len(items) == 0:
        raise DataError("the map-style data set is empty; give it one example at least")
    pairs = [_item(items, index) for index in range(len(items))]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise DataError("an item of the map-style data set is not a pair (input, label)")
    inputs = _stack([pair[0] for pair in pairs], "inputs")
    labels = _stack([pair[1] for pair in pairs], "labels")
    classes = getattr(items, "classes", None)
    if not isinstance(classes, list | tuple):
        whole = labels.dtype.kind in "iu" and labels.size > 0
        classes = [str(label) for label in range(min(int(labels.max()) + 1, MAX_CLASSES + 1))] if whole else []
    return held_out("map_style", inputs, labels, tuple(str(name) for name in classes), data)


def _item(items: Any, index: int) -> Any:
    try:
        return items[index]
    except Exception as error:
        raise DataError(f"item {index} of the map-style data set raised {type(error).__name__}: {error}") from None


def _stack(values: list, what: str) -> np.ndarray:
    """Return the arrays as one; DataError unless all have one shape."""
    try:
        arrays = [np.asarray(value) for value in values]
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"the map-style data set's {what} are no arrays: {error}; give numbers of one shape") from None
    if len(shapes := {array.shape for array in arrays}) > 1:
        raise DataError(
            f"the map-style data set's {what} have different shapes, {sorted(shapes)[:2]} among them; give one shape"
        )
    return np.stack(arrays)


def held_out(name: str, inputs: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], data: Data) -> Dataset:
    """Return the data set with round(n * test_fraction) examples held out, by `default_rng([seed, *b"split"])`."""
    _check(name, inputs, labels, class_names)
    labels = labels.astype(np.int32)
    num_test = num_held_out(len(labels), data.test_fraction)
    if num_test == len(labels):
        raise DataError(f"data.test_fraction {data.test_fraction} leaves no example of {len(labels)} to train on")
    if num_test == 0:
        return Dataset(name=name, train=Split(inputs, labels), test=None, class_names=class_names)
    order = np.random.default_rng([data.seed, *b"split"]).permutation(len(labels))
    test, train = np.sort(order[:num_test]), np.sort(order[num_test:])
    return Dataset(
        name=name,
        train=Split(inputs[train], labels[train]),
        test=Split(inputs[test], labels[test]),
        class_names=class_names,
    )


def _check(name: str, inputs: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> None:
    if inputs.ndim not in (2, 4) or 0 in inputs.shape or inputs.dtype.kind not in "buif":
        raise DataError(
            f"{name} has inputs of shape {list(inputs.shape)} and dtype {inputs.dtype}; "
            "numbers [examples, features] or [examples, height, width, channels] are needed (grey images: x[..., None])"
        )
    if not np.isfinite(inputs).all():
        raise DataError(f"{name} has {np.count_nonzero(~np.isfinite(inputs))} input values that are not finite")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{name} has labels of shape {list(labels.shape)}, {labels.dtype}; one integer each is needed")
    if len(class_names) < 2:
        raise DataError(
            f"{name} has labels from {labels.min()} to {labels.max()}; two classes at least are needed, from 0"
        )
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise DataError(
            f"{name} has labels from {labels.min()} to {labels.max()}; with {len(class_names)} classes they must run "
            f"from 0 to {len(class_names) - 1}"
        )
    if len(class_names) > MAX_CLASSES:
        raise DataError(f"{name} has {len(class_names):,} classes; the limit is {MAX_CLASSES:,}")


def _read_table(path: Path) -> np.ndarray:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = _is_header(next(csv.reader(file), []))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a file without rows, which is refused below
            table = np.loadtxt(
                path, delimiter=",", skiprows=int(header), ndmin=2, quotechar='"', encoding="utf-8-sig", comments=None
            )
    except (OSError, UnicodeError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as comma-separated numbers: {_with_data_row(str(error))}") from None
    if table.size == 0:
        raise DataError(f"{path} holds no rows")
    return table


def _is_header(fields: list[str]) -> bool:
    """Say whether a first row is a header: every field of it is a name, none a number."""
    for field in fields:
        try:
            float(field)
        except ValueError:
            continue
        return False
    return bool(fields) and all(field.strip() for field in fields)


def _with_data_row(message: str) -> str:
    """Return NumPy's message with its row counted from 1, as all our messages count (it counts both ways)."""
    message = message.removesuffix(".").split("; use `usecols`")[0]
    first = 1 if "could not convert" in message else 0
    counted = re.sub(r"at row (\d+)", lambda found: f"in data row {int(found[1]) + first}", message)
    rule = "; every field must be a number, the label too" if "could not convert" in message else ""
    return counted if counted == message else f"{counted}{rule}; mend or drop that row"


def _refuse(path: Path, bad: np.ndarray, values: np.ndarray, rule: str) -> None:
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise DataError(f"{path} has {values[row, column]} in data row {row + 1}; {rule}")
