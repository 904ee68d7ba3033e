"""Trainers in processes of their own, to be killed: forked from a server that has the imports behind it, so that twenty
of them start in the time of one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from spec.errors import run_and_leave

PRELOADED = [
    "jax_impl.train",
    "jax_impl.many",
    "jax_impl.trainer",
    "torch_ref.train",
    "torch_ref.trainer",
    "orbax.checkpoint.experimental.v1",
    "sklearn.datasets",
]
PATIENCE = 60.0  # seconds that anything may take on a machine that is busy


class Started(NamedTuple):
    """A trainer at work, and where its output goes."""

    process: BaseProcess
    out: Path
    err: Path

    def wait_for(self, sign: Callable[[], bool], *, poll: float = 0.002, seconds: float = PATIENCE) -> None:
        """Return once `sign` is there. Raises AssertionError, with what the process said, when it ended before, or when
        so many `seconds` are over."""
        deadline = time.monotonic() + seconds
        while not sign():
            assert self.process.is_alive(), f"ended with {self.process.exitcode}: {self.err.read_text()}"
            assert time.monotonic() < deadline, f"nothing within {seconds} s: {self.out.read_text()}"
            time.sleep(poll)

    def send(self, number: int) -> None:
        """Send it the signal of that number."""
        os.kill(self.process.pid, number)

    def ended(self, *, seconds: float = PATIENCE) -> int:
        """Wait so long for its end; return its status, minus the signal's number if one killed it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode


@contextlib.contextmanager
def started(
    folder: Path, framework: str, arguments: list[str], *, cache: Path, prepare: Callable[[], None] | None = None
) -> Iterator[Started]:
    """Run a trainer's command line in a process of its own, its output in files of `folder`; kill it in the end.

    Compiled programs are kept in `cache`. `prepare` is called there before.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    out, err = folder / "out.txt", folder / "err.txt"
    out.write_text("")
    process = context.Process(target=_train, args=(framework, arguments, out, err, cache, prepare))
    process.start()
    try:
        yield Started(process, out, err)
    finally:
        process.kill()
        process.join()


def _train(
    framework: str, arguments: list[str], out: Path, err: Path, cache: Path, prepare: Callable[[], None] | None
) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the shell of the tests does with it
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    import jax

    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from spec_tests.conftest import FRAMEWORKS

    if prepare:
        prepare()
    run_and_leave(lambda: FRAMEWORKS[framework](arguments))
