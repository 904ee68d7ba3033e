"""The one cache: `<root>/{FashionMNIST,MNIST}/raw/*-ubyte`, torchvision's layout, every content verified by sha256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from spec.datasets import idx
from spec.datasets.catalog import IDX_SETS, IdxFile, IdxSet
from spec.errors import DataError, python_command
from spec.files import expanded, write_atomic

LOCK_SECONDS = 900


def root() -> Path:
    """Return the cache's root: `$LOCKSTEP_CACHE`, else `lockstep` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if named := os.environ.get("LOCKSTEP_CACHE"):
        return expanded(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"


def raw_folder(idx_set: IdxSet) -> Path:
    """Return the folder of the cache that holds the set's files."""
    return root() / idx_set.folder / "raw"


def read_verified(path: Path, file: IdxFile) -> bytes:
    """Return the decompressed content of `path`; DataError, saying what is wrong, unless its sha256 is `file`'s."""
    content = idx.read_bytes(path, limit=file.num_bytes)
    digest = hashlib.sha256(content).hexdigest()
    if digest == file.sha256:
        return content
    if other := _known_as(digest):
        raise DataError(f"{path} is mislabelled: it holds {other}, not {file.name}")
    if len(content) < file.num_bytes:
        raise DataError(f"{path} is cut short: it holds {len(content):,} of {file.num_bytes:,} bytes")
    raise DataError(f"{path} is damaged: its sha256 is {digest}, and should be {file.sha256}")


def read_cached(idx_set: IdxSet, file: IdxFile) -> bytes:
    """Return the content of a file of the cache; DataError unless it is `file`'s, as torchvision reads it: not gzip."""
    path = raw_folder(idx_set) / file.name
    content = read_verified(path, file)
    if path.stat().st_size != len(content):
        raise DataError(f"{path} is compressed; the cache holds its files uncompressed")
    return content


def missing_files(idx_set: IdxSet) -> list[IdxFile]:
    """Return the files that the cache lacks."""
    return [file for file in idx_set.files if not os.path.exists(raw_folder(idx_set) / file.name)]


def damage(idx_set: IdxSet) -> dict[str, str]:
    """Return, by file name, what is wrong with each file of the cache that is missing or damaged."""
    found = {}
    for file in idx_set.files:
        path = raw_folder(idx_set) / file.name
        try:
            if not os.path.exists(path):
                raise DataError(f"{path} is missing")
            read_cached(idx_set, file)
        except DataError as error:
            found[file.name] = str(error)
    return found


def store(idx_set: IdxSet, contents: Mapping[str, bytes]) -> None:
    """Write verified `contents`, by file name, into the cache, each file whole or not at all."""
    with _explained(raw_folder(idx_set)):
        for name, content in contents.items():
            write_atomic(raw_folder(idx_set) / name, content)


def mend(idx_set: IdxSet) -> str:
    """Say how to mend the set's cached files."""
    return f"`{python_command()} -m spec.datasets fetch {idx_set.name}` fetches it anew (or from --data-dir DIR)"


@contextmanager
def lock(idx_set: IdxSet) -> Iterator[None]:
    """Hold the set's lock: one process fetches, the others wait and then find the files."""
    folder = raw_folder(idx_set)
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / ".lock")
        try:
            held.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise DataError(
                f"another process has held {folder / '.lock'} for {LOCK_SECONDS} s; end it, then try again"
            ) from None
    try:
        yield
    finally:
        held.release()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the data cache {folder} cannot be written: {error}; set LOCKSTEP_CACHE to a directory that can"
        ) from None


def _known_as(digest: str) -> str | None:
    for idx_set in IDX_SETS.values():
        for file in idx_set.files:
            if file.sha256 == digest:
                return f"{idx_set.title}'s {file.name}"
    return None
