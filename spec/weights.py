"""Weights in safetensors: a file's bytes are never trusted, and what does not fit a recipe is listed, all of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spec import params
from spec.errors import StateError
from spec.params import Leaf
from spec.table import printable

MOST_BYTES = 9 * params.MAX_PARAMETERS  # float64 numbers, and room for names
MOST_LINES = 1_000
LONGEST_NAME = 100
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


@dataclass(frozen=True)
class Foreign:
    """An array of numbers that NumPy does not have (bfloat16, say): no more than its shape, and what it holds."""

    shape: tuple[int, ...]
    dtype: str


Found = Mapping[str, np.ndarray | Foreign]


def read_file(path: Path) -> bytes:
    """Return the content of a file of weights. Raises StateError when there is none, or when it is too large to be."""
    if not os.path.isfile(path):
        what = "is no regular file" if os.path.exists(path) else "does not exist"
        raise StateError(f"{path} {what}; name a file of weights")
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise StateError(f"{path} has {size:,} bytes; weights have at most {MOST_BYTES:,}; name another file")
        return path.read_bytes()
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error}; name another file") from None


def from_safetensors(content: bytes, *, source: str) -> dict[str, np.ndarray | Foreign]:
    """Return the arrays in `content` by name.

    Raises StateError, naming `source`, unless it is safetensors from the first byte to the last.
    """
    from safetensors import SafetensorError, deserialize

    try:
        return {name: _array(entry) for name, entry in deserialize(content)}
    except (SafetensorError, ValueError) as error:
        reason = str(error).removeprefix("Error while deserializing: ")
        raise StateError(
            f"{source} is damaged, or no safetensors file: {shown(reason)}; make it anew, or name another"
        ) from None


def to_safetensors(state: Mapping[str, np.ndarray]) -> bytes:
    """Return the canonical state as safetensors, each array made contiguous first (a strided one is scrambled)."""
    from safetensors.numpy import save

    return save({name: np.asarray(array, order="C") for name, array in state.items()})


def stored_dtype(precision: str) -> np.dtype:
    """Return the dtype that a recipe's weights are kept in: float32 where the arithmetic is bfloat16."""
    return np.dtype(np.float64 if precision == "float64" else np.float32)


def mismatches(found: Found, leaves: Sequence[Leaf], precision: str) -> list[str]:
    """Return what keeps `found` from being the leaves' weights: names, shapes, dtypes, numbers; a line each."""
    dtype, shapes = stored_dtype(precision), params.state_shapes(leaves)
    unknown = [name for name in found if name not in shapes]
    looked_at = {name: array for name, array in found.items() if name in shapes}
    looked_at |= {name: found[name] for name in unknown[:MOST_LINES]}
    placeholder = dtype.type(0)  # of an array whose dtype is listed already
    lines = params.mismatches(
        {
            name if name in shapes else shown(name): array
            if isinstance(array, np.ndarray) and array.dtype == dtype
            else np.broadcast_to(placeholder, array.shape)
            for name, array in looked_at.items()
        },
        shapes,
    )
    lines += [
        f"{name} holds {shown(str(array.dtype))}; it must hold {dtype}"
        for name, array in looked_at.items()
        if name in shapes and array.dtype != dtype
    ]
    more = len(unknown) - MOST_LINES
    return lines + ([f"and {more:,} names more that are none of its arrays"] if more > 0 else [])


def check(found: Found, leaves: Sequence[Leaf], precision: str, *, what: str, mend: str) -> dict[str, np.ndarray]:
    """Return `found` as a canonical state, in the order of `leaves`: contiguous arrays of their own.

    Raises StateError, which says `what` does not fit, lists every mismatch, and ends with `mend`.
    """
    if lines := mismatches(found, leaves, precision):
        raise StateError(f"{what} does not fit:\n{_indented(lines)}\n{mend}")
    return {leaf.name: np.array(found[leaf.name], order="C") for leaf in leaves}


def shown(text: str) -> str:
    """Return a text of a file's that is safe to print: no control characters, and not too long."""
    text = printable(text)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 3] + "..."


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def _array(entry: Mapping[str, Any]) -> np.ndarray | Foreign:
    shape = tuple(entry["shape"])
    if entry["dtype"] not in _DTYPES:
        return Foreign(shape, entry["dtype"])
    return np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(shape)
