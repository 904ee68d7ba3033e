"""Files written whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from spec.errors import UserError


def expanded(path: str | Path) -> Path:
    """Return `path` with a leading `~` or `~user` replaced; as it is where there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 -- pathlib's raises RuntimeError then


def check_target(path: Path, *, flag: str) -> None:
    """Raise UserError, before anything is computed for it, unless a file can be put at `path`, which `flag` named."""
    folder = path.absolute().parent
    if os.path.isdir(path):
        raise UserError(f"{flag} {path} is a directory; name a file")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{flag} {path}: {folder.name} is a file, not a directory; name another place")
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {path}: its directory does not exist; make it first")
    try:
        with tempfile.NamedTemporaryFile(prefix=_prefix(path), dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: nothing can be written there ({error.strerror}); name another place") from None


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` by a temporary file beside it, synced and renamed: a reader sees the old or the new.

    Raises OSError, which names `path`; then that is as it was and nothing else is left.
    """
    try:
        _write_beside(path, content)
    except OSError as error:
        if not error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _write_beside(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def is_leftover(name: str, *, of: Iterable[str]) -> bool:
    """Return whether a file of that name is what a killed process left half-written of one of the files `of`."""
    return any(re.fullmatch(re.escape(_prefix(Path(file))) + "[a-z0-9_]{8}", name) for file in of)


def _prefix(path: Path) -> str:
    """Return how the name of the temporary file for `path` starts."""
    return f".{path.name}."
