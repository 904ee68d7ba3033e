"""Files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
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
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {path}: nothing may be written there; name another place")


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` by a temporary file beside it, synced and renamed: a reader sees the old or the new.

    Raises OSError; then `path` is as it was and nothing else is left.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
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
