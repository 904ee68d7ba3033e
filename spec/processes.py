"""What the command line says of the processes of a run, before any of them has met another."""

from __future__ import annotations

import re

from spec.errors import UserError
from spec.sweep import ManyFlags

TOGETHER = ("coordinator", "num_processes", "process_id")


def check(flags: ManyFlags) -> None:
    """Raise UserError for flags that name no process of a run."""
    given = [name for name in TOGETHER if getattr(flags, name) is not None]
    if given and not flags.distributed:
        raise UserError(f"{_option(given[0])} is for a run of several processes; add --distributed")
    if not flags.distributed:
        return
    if flags.seeds is not None or flags.sweep:
        raise UserError("--distributed is for one run, and --seeds and --sweep are for many; leave one out")
    for name in ("connect_timeout", "heartbeat_timeout"):
        if getattr(flags, name) < 1:
            raise UserError(f"{_option(name)} {getattr(flags, name)} must be 1 second or more")
    if given and len(given) < len(TOGETHER):
        missing = [_option(name) for name in TOGETHER if name not in given]
        raise UserError(f"{_option(given[0])} needs {' and '.join(missing)} beside it; or leave out all three")
    if given:
        _check_named(flags.coordinator, flags.num_processes, flags.process_id)


def _check_named(coordinator: str, num_processes: int, process_id: int) -> None:
    address = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):([0-9]{1,5})", coordinator)
    if not address or not 1 <= int(address[2]) <= 65535:
        raise UserError(f"--coordinator {coordinator} is no HOST:PORT; 10.0.0.1:1234, say")
    if num_processes < 1:
        raise UserError(f"--num-processes {num_processes} are none; use 1 at least")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id {process_id} is none of {num_processes} processes, which are counted from 0; "
            f"use 0 to {num_processes - 1}"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
