"""The state of a run on the disk, as safetensors, never a pickle: canonical names (`spec.params`) and layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from spec.run.checkpoints import CheckpointError
from spec.weights import to_safetensors

STATE = "state.safetensors"
Snapshot = dict[str, np.ndarray]


def write(snapshot: Snapshot, folder: Path) -> None:
    """Write a trainer's snapshot into `folder`. Raises OSError, which the format's own writer hides."""
    (folder / STATE).write_bytes(to_safetensors(snapshot))


def read(folder: Path, *, like: Snapshot) -> Snapshot:
    """Return what `write` was given. Raises CheckpointError when it has other arrays than `like`."""
    found = load_file(folder / STATE)
    names = [name for name in {**like, **found} if _kind(like.get(name)) != _kind(found.get(name))]
    if names:
        raise CheckpointError(
            f"{folder / STATE} is the state of another network or optimiser: {', '.join(names[:5])} do not fit"
        )
    return found


def _kind(array: np.ndarray | None) -> tuple | None:
    return None if array is None else (array.shape, array.dtype)
