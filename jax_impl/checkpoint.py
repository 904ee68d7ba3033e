"""The state of a run on the disk, by Orbax; that it is read as it was written is `spec.run.checkpoints`' to prove."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jax_impl.step import TrainState
from spec.run.checkpoints import CheckpointError

STATE = "state"


def preload() -> None:
    """Import Orbax, which takes 0.4 s, while there is something else to wait for."""
    import orbax.checkpoint.experimental.v1  # noqa: F401


def write(state: TrainState, folder: Path) -> None:
    """Write `state`, whose leaves are NumPy arrays, into a new folder of `folder`. Raises OSError."""
    import orbax.checkpoint.experimental.v1 as ocp

    leaves = _plain(state)
    _reserve(folder, sum(leaf.nbytes for leaf in leaves.values()))
    with _refusals_as_errors(), _alone():
        ocp.save(folder.absolute() / STATE, leaves)


def read(folder: Path, *, like: TrainState) -> TrainState:
    """Return what `write` was given, NumPy arrays of the shapes and dtypes of `like`.

    Raises CheckpointError when another network's or optimiser's state is there.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    path = folder.absolute() / STATE
    with _alone():
        there = ocp.metadata(path).metadata
    found = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in there.items()}
    wanted = {name: (leaf.shape, leaf.dtype) for name, leaf in _plain(like).items()}
    if found != wanted:
        names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        raise CheckpointError(f"{path} is the state of another network or optimiser: {', '.join(names[:5])} do not fit")
    with _alone():
        loaded = ocp.load(path, _plain(like))
    return jax.tree.unflatten(jax.tree.structure(like), [np.asarray(loaded[name]) for name in _plain(like)])


def _reserve(folder: Path, size: int) -> None:
    """Raise OSError unless `folder` has room for so many bytes: what TensorStore says where there is none is a page of
    tracebacks from its threads."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)


@contextlib.contextmanager
def _refusals_as_errors() -> Iterator[None]:
    """Raise OSError for what the disk refuses: TensorStore says it in a ValueError, and each of Orbax's threads logs it
    with a traceback."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except ValueError as error:
        number = re.search(r"os_error_code='([0-9]+)'", str(error))
        if not number and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        code = int(number[1]) if number else errno.ENOSPC
        raise OSError(code, os.strerror(code)) from None
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Have Orbax do what it does in this process alone: of several processes one has all of the state, and writes.

    Asked to, Orbax still compares the path with that of every process, and would wait for them for ever, unless it
    takes this process for the only one.
    """
    import orbax.checkpoint.experimental.v1 as ocp
    from orbax.checkpoint.experimental.v1._src.saving import execution

    own = jax.process_index()
    context = ocp.Context()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = own, {own}
    count = execution.multihost.process_count
    execution.multihost.process_count = lambda: 1
    try:
        with context:
            yield
    finally:
        execution.multihost.process_count = count


def _plain(state: TrainState) -> dict[str, np.ndarray]:
    """Return the leaves by their paths, in the order of `jax.tree.leaves`."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
