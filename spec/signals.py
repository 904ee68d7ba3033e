"""SIGINT and SIGTERM: a run saves what it has and leaves; anything else leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

IMPORTING = "<frozen importlib._bootstrap>"  # the file of the functions that import
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """The process was told to stop by the signal of that `number`; the message says what became of its work."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


class StopRequest:
    """Whether a signal has come: its `number`, else None."""

    number: int | None = None

    def came(self) -> bool:
        """Return whether a signal has come."""
        return self.number is not None


def raise_on_signals() -> None:
    """Have SIGTERM raise Stopped, and SIGINT KeyboardInterrupt, wherever the program is; in an import both end it.

    An exception in the middle of an import is swallowed, or takes another's name, or crashes what is written in C.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            os.write(2, b"interrupted\n" if number == signal.SIGINT else b"terminated\n")
            os._exit(128 + number)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, stop)


def _is_importing(frame: FrameType | None) -> bool:
    while frame and frame.f_code.co_filename != IMPORTING:
        frame = frame.f_back
    return frame is not None


@contextmanager
def deferred() -> Iterator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM is only noted, for the body to see; a second one ends the process at once.

    Python gives signals to the main thread alone, so in another one nothing is changed.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.came():
            os.write(2, b"left at once: what was saved is there, no more\n")
            os._exit(128 + number)
        request.number = number
        line = b"\n" if os.isatty(2) else b""  # behind the ^C of a terminal
        os.write(2, line + b"stopping; once more to leave at once\n")  # printing is not safe in a signal handler

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as a shell may have it
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
