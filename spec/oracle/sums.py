"""How the oracle adds up: as float64 does, or as a plain program does in a narrower format (S12.5)."""

from __future__ import annotations

import numpy as np


class Sums:
    """Sums and matrix products as NumPy makes them in float64."""

    def product(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the matrix product, [rows, columns], of `left` [rows, m] and `right` [m, columns]."""
        return left @ right

    def total(self, terms: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
        """Return the sum of `terms` over `axis`."""
        return terms.sum(axis=axis)


class PlainSums(Sums):
    """Sums as a plain program makes them in a narrower format; what comes out is float64 again.

    Nothing is assumed of the roundings: where a term comes many times, as the background of images does, they all go
    one way, and a long sum is farther off than independent ones would put it.
    """

    def __init__(self, dtype: np.typing.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)

    def product(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the matrix product as the BLAS makes it in the narrower format."""
        return (left.astype(self._dtype) @ right.astype(self._dtype)).astype(np.float64)

    def total(self, terms: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
        """Return the sum, made by adding one term after another in the order of the axes."""
        axes = (axis,) if isinstance(axis, int) else axis
        kept = np.moveaxis(terms, axes, range(-len(axes), 0)).astype(self._dtype)
        kept = kept.reshape(*kept.shape[: terms.ndim - len(axes)], -1)
        return np.cumsum(kept, axis=-1, dtype=self._dtype)[..., -1].astype(np.float64)


FLOAT64 = Sums()
