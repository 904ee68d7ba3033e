"""Work that goes on while the program does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_background(function: Callable, *arguments: object) -> Future:
    """Call `function` in a thread of its own; the future gives what it returns, or raises what it raised.

    The thread is a daemon, so that an interrupted program ends without waiting for a compiler.
    """
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
