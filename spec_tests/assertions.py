"""Comparisons of named arrays: a failure names item, leaf, place, found and wanted; `test_meta.py` makes each fail."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from spec.params import check_arrays
from spec_tests.tolerances import KAPPA, ceiling, unit_roundoff

Arrays = Mapping[str, np.ndarray]


def assert_identical(found: Arrays, expected: Arrays, *, item: str) -> None:
    """Fail unless both hold the same names, shapes, dtypes and bits."""
    _same_names(found, expected, item)
    for name, wanted in expected.items():
        array, wanted = np.asarray(found[name]), np.asarray(wanted)
        assert array.dtype == wanted.dtype, f"{item}: {name} is {array.dtype}, wanted {wanted.dtype}"
        same = array.tobytes() == wanted.tobytes()
        assert same, f"{item}: {name} differs: {_worst(array, wanted)}"


def assert_within(found: Arrays, expected: Arrays, *, bound: float, item: str, relative_to_layer: bool = False) -> None:
    """Fail unless every value lies within `bound` of the expected one.

    With `relative_to_layer` the bound is times the largest expected value of the layer (all leaves that share the name
    before the dot): a bias before BatchNorm has gradient 0, and only its layer says what is small (S5).
    ValueError if that allows more than the dtype's ceiling: such a comparison says nothing.
    """
    _same_names(found, expected, item)
    for name, wanted in expected.items():
        scale = layer_scale(expected, name) if relative_to_layer else 1.0
        largest = layer_scale(expected, name)
        most = ceiling(np.asarray(found[name]).dtype) * (largest if relative_to_layer else max(1.0, largest))
        if bound * scale > most:
            raise ValueError(f"{item}: {name} may be {bound * scale:.3g} off, and {most:.3g} is the most; tighten it")
        array = np.asarray(found[name], np.float64)
        error = float(np.abs(array - wanted).max(initial=0))
        assert error <= bound * scale, f"{item}: {name} is {error:.3g} off, allowed {bound * scale:.3g}: " + _worst(
            array, np.asarray(wanted)
        )


def assert_error_ratio(ours: Arrays, theirs: Arrays, truth: Arrays, *, item: str) -> None:
    """Fail unless, leaf by leaf, each side's error against float64 is at most KAPPA times the other's (S12.5)."""
    for name, ratio in error_ratios(ours, theirs, truth).items():
        assert ratio <= KAPPA, f"{item}: {name}: one side's error is {ratio:.3g} times the other's, allowed {KAPPA}"


def error_ratios(
    ours: Arrays,
    theirs: Arrays,
    truth: Arrays,
    *,
    plain: Arrays | None = None,
    terms: int = 1,
    dtype: np.typing.DTypeLike = np.float32,
) -> dict[str, float]:
    """Return, by leaf, the larger side's error against `truth` over the other side's (S12.5).

    An error counts as at least sqrt(m) u times the layer's largest value, what independent roundings of a sum of m
    `terms` come to in `dtype`, plus how far `plain`, the same worked out with plain sums in `dtype`, lies from the
    truth anywhere in the layer: a side that sums better than that does not put the other in the wrong. What is allowed
    stays under the dtype's ceiling of the layer's largest value.
    """
    plain = truth if plain is None else plain
    for side in (ours, theirs, plain):
        _same_names(side, truth, "error ratio")
    scales = _by_layer(truth)
    moved = _by_layer({name: plain[name] - wanted for name, wanted in truth.items()})
    ratios = {}
    for name, wanted in truth.items():
        scale = scales[_layer(name)]
        rounding = math.sqrt(terms) * unit_roundoff(dtype) * scale + moved[_layer(name)]
        floor = min(rounding, ceiling(dtype) * scale / KAPPA)
        errors = [float(np.abs(np.asarray(side[name], np.float64) - wanted).max(initial=0)) for side in (ours, theirs)]
        ratios[name] = times(max(errors), max(min(errors), floor))
    return ratios


def times(size: float, unit: float) -> float:
    """Return how many times `unit` goes into `size`: 0 if both are 0, infinity if `unit` alone is."""
    return size / unit if unit else math.inf if size else 0.0


def assert_no_shared_memory(first: Arrays, second: Arrays, *, item: str) -> None:
    """Fail if any array of `first` shares memory with one of `second`: a step in place would change both."""
    for name, array in first.items():
        for other, candidate in second.items():
            shared = np.shares_memory(np.asarray(array), np.asarray(candidate))
            assert not shared, f"{item}: {name} and {other} share memory"


def layer_scale(arrays: Arrays, name: str) -> float:
    """Return the largest absolute value among the leaves of the layer that `name` belongs to."""
    return _by_layer({leaf: array for leaf, array in arrays.items() if _layer(leaf) == _layer(name)})[_layer(name)]


def largest_difference(first: Arrays, second: Arrays) -> float:
    """Return the largest absolute difference over all leaves, compared in float64; NaN counts as infinite."""
    _same_names(first, second, "largest difference")
    differences = [
        np.abs(np.asarray(array, np.float64) - np.asarray(second[name], np.float64)).max(initial=0)
        for name, array in first.items()
    ]
    return float(np.nan_to_num(max(differences, default=0.0), nan=np.inf))


def _same_names(found: Arrays, expected: Arrays, item: str) -> None:
    check_arrays(found, {name: np.shape(array) for name, array in expected.items()}, what=item)
    check_arrays(expected, {name: np.shape(array) for name, array in found.items()}, what=f"{item}, what is wanted")


def _by_layer(arrays: Arrays) -> dict[str, float]:
    """Return the largest absolute value of each layer."""
    largest: dict[str, float] = {}
    for name, array in arrays.items():
        largest[_layer(name)] = max(largest.get(_layer(name), 0.0), float(np.abs(array).max(initial=0)))
    return largest


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name


def _worst(array: np.ndarray, wanted: np.ndarray) -> str:
    place = np.unravel_index(np.argmax(np.abs(array - wanted)), array.shape) if array.size else ()
    return f"at {list(map(int, place))} got {array[place]!r}, wanted {wanted[place]!r}"
