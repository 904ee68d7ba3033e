"""One writer a run directory: who comes second is refused, and told who was first."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from spec.errors import RunDirectoryError
from spec.files import write_atomic

LOCK, HOLDER = ".lock", ".lock.json"


class RunLock:
    """The right to write a run directory: the operating system's lock on a file in it, gone when the process is.

    As a context manager it gives the right back. `stale` says who had it before and ended without doing so, killed
    perhaps; None if nobody did. Raises RunDirectoryError, naming the holder, when another process has it.
    """

    def __init__(self, folder: Path) -> None:
        self._holder = folder / HOLDER
        self._lock = FileLock(folder / LOCK, timeout=0)
        try:
            self._lock.acquire()
            self.stale = _describe(self._holder) if self._holder.exists() else None
            holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            write_atomic(self._holder, json.dumps(holder | {"command": " ".join(sys.argv)}).encode())
        except Timeout:
            raise RunDirectoryError(
                f"{folder} is being written by {_describe(self._holder)}; wait until it is done, or name another --out"
            ) from None
        except OSError as error:
            self.release()
            raise RunDirectoryError(
                f"the run directory {folder} cannot be written: {error}; name another --out"
            ) from None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the right back, if it was not; the lock's files go first, nothing being written any more."""
        if self._lock.is_locked:
            with suppress(OSError):  # removed meanwhile, say
                self._holder.unlink(missing_ok=True)
                (self._holder.parent / LOCK).unlink(missing_ok=True)
            self._lock.release()


def _describe(holder: Path) -> str:
    try:
        who = json.loads(holder.read_text("utf-8"))
        return f"process {who['process']} on {who['host']} since {who['since']} ({who['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
