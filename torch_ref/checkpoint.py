"""The state of a run on the disk, as safetensors, never a pickle: canonical names (`spec.params`) and layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from spec.run.checkpoints import CheckpointError

STATE = "state.safetensors"
Snapshot = dict[str, np.ndarray]


def write(snapshot: Snapshot, folder: Path) -> None:
    """Write a trainer's snapshot into `folder`, each array made contiguous first (a strided one is scrambled)."""
    save_file({name: np.asarray(array, order="C") for name, array in snapshot.items()}, folder / STATE)


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
