"""The notebooks' quick mode: the same cells on fewer epochs, examples and seeds, for tests that run them whole."""

from __future__ import annotations

import os
from typing import TypeVar

from spec.errors import UserError

VARIABLE = "LOCKSTEP_QUICK"
T = TypeVar("T")


def is_quick() -> bool:
    """Return whether quick mode is on: the environment's LOCKSTEP_QUICK is 1. Raises UserError for no switch."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise UserError(f"{VARIABLE} is {value!r}; set it to 1 for quick mode, or to 0 or nothing for full mode")
    return value == "1"


def sized(*, full: T, quick: T) -> T:
    """Return `full`, or in quick mode `quick`."""
    return quick if is_quick() else full


def said() -> str:
    """Return which mode is on, in a sentence."""
    return sized(
        full=f"full mode: every figure as the text has it ({VARIABLE}=1 in the environment runs all in a minute)",
        quick=f"quick mode ({VARIABLE}=1): few epochs, examples and seeds, so the figures here mean little",
    )
