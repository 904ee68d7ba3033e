"""The errors a user can cause or mend. Programs print them on one to ten lines and exit with status 2, or their own."""

from __future__ import annotations

import difflib
import errno
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from spec.signals import Stopped, raise_on_signals

LONGEST_LINE = 2_000  # letters of a line of a message
MOST_LINES = 10
MOST_LISTED = 500  # lines of a message that lists all there is, as that of a state that does not fit a network


class UserError(Exception):
    """Something the user gave is wrong; the message names the value, the rule and the mend."""

    status = 2  # of the process that ends with it


class RecipeError(UserError):
    """A recipe, or a change made to it on the command line, breaks a rule."""


class DataError(UserError):
    """A data file is missing, damaged or not what its name says."""


class StateError(UserError):
    """A network's or an optimiser's state does not fit: names, shapes or numbers, all of them a line each."""


class RunDirectoryError(UserError):
    """A run directory cannot be used or written."""


class LostProcessError(UserError):
    """A process of the run is gone, or never came; started again, all of them may well go on."""

    status = os.EX_TEMPFAIL  # so that whatever starts programs knows that this one is worth another try


def shown(text: str, *, most: int = 60) -> str:
    """Return what a message says of `text` that a user gave: its ends if it is long, no letter that moves a cursor."""
    text = text if len(text) <= most else f"{text[: most // 2]}...{text[3 - most // 2 :]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the choice nearest to `word`, or an empty string."""
    near = nearest(word, choices)
    return f" (did you mean {near!r}?)" if near else ""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice nearest to `word`, None when none is near; of equals, the one that has the same letters."""

    def likeness(choice: str) -> tuple[float, bool]:
        return difflib.SequenceMatcher(None, choice, word).ratio(), sorted(choice) == sorted(word)

    return max(difflib.get_close_matches(word, list(choices)), key=likeness, default=None)


def run_program(module: str) -> NoReturn:
    """Import `module`, run its `main`, and leave the process with the `exit_status`.

    A module that is a program begins with this call, before it imports anything else, so that imports can be
    interrupted too.
    """
    run_and_leave(lambda: importlib.import_module(module).main())


def run_and_leave(program: Callable[[], None]) -> NoReturn:
    """Run `program`, and leave the process with its `exit_status`.

    A failed or interrupted one leaves at once: the threads of a device program that is still running, and output that
    cannot be flushed, would otherwise crash the interpreter as it shuts down.
    """
    raise_on_signals()
    status = exit_status(program)
    if status == 0:
        sys.exit(0)
    sys.stderr.flush()
    os._exit(status)


def require(package: str, *, extra: str) -> None:
    """Raise UserError unless `package` is installed, naming the extra that brings it."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{package} is not installed; `{python_command()} -m pip install -c constraints/main.txt -e '.[{extra}]'` "
            "installs it, in the checkout"
        )


def python_command() -> str:
    """Return how this Python is called from here, for messages that say what to type: `.venv/bin/python`, say."""
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith("..") else relative


def _lines(message: str, *, most: int) -> list[str]:
    """Return the lines of a message; if there are more than `most`, the first ones and the last, which is the mend."""
    lines = [shown(line, most=LONGEST_LINE) for line in message.split("\n")]
    left_out = len(lines) - most + 1
    return lines if left_out <= 1 else [*lines[: most - 2], f"... {left_out:,} lines more", lines[-1]]


def outcome(error: BaseException) -> tuple[int, str] | None:
    """Return the status that a program ends with for an error, and what it says of it; None for an error of ours.

    2 is for a mistake of the user's, 75 where another process was lost, 130 and 143 for SIGINT and SIGTERM, 141 for a
    broken pipe.
    """
    match error:
        case UserError():
            return error.status, str(error)
        case MemoryError():
            return 2, f"not enough memory ({error}); use a smaller batch, network or data set"
        case KeyboardInterrupt():
            return 130, "interrupted"
        case Stopped():
            return 128 + error.number, str(error) or "terminated"
        case BrokenPipeError():
            return 141, "nobody reads its output any more"
        case OSError(errno=errno.ENOSPC):
            return 2, f"no space left to write output: {error}"
    return None


def exit_status(program: Callable[[], None]) -> int:
    """Run `program`; return 0, or the status of the `outcome` of what it raised, which is said on standard error."""
    try:
        program()
        print(end="", flush=True)
    except BaseException as error:
        if (found := outcome(error)) is None:
            raise
        status, message = found
        if isinstance(error, KeyboardInterrupt | Stopped):
            print(message, file=sys.stderr)
        elif not isinstance(error, BrokenPipeError):
            most = MOST_LISTED if isinstance(error, StateError) else MOST_LINES
            print("\n".join(_lines(f"error: {message}", most=most)), file=sys.stderr)
        return status
    return 0
