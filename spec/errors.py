"""The errors a user can cause and mend. Programs print them on one to ten lines and exit with status 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress


class UserError(Exception):
    """Something the user gave is wrong; the message names the value, the rule and the mend."""


class RecipeError(UserError):
    """A recipe, or a change made to it on the command line, breaks a rule."""


class DataError(UserError):
    """A data file is missing, damaged or not what its name says."""


class RunDirectoryError(UserError):
    """A run directory cannot be used or written."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the choice nearest to `word`, or an empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def exit_status(program: Callable[[], None]) -> int:
    """Run `program`; return 0, 2 after a `UserError`, 130 after an interrupt, 141 when our output's reader left."""
    try:
        program()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"error: not enough memory ({error}); use a smaller batch, network or data set", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with suppress(OSError):
            sys.stdout.close()
        return 141
    return 0
