"""What the command line says of the devices and the processes of a run, before any of them is there."""

from __future__ import annotations

import re

from spec.errors import UserError
from spec.sweep import ManyFlags

TOGETHER = ("coordinator", "num_processes", "process_id")
TIMES = ("connect_timeout", "heartbeat_timeout")


def check(flags: ManyFlags) -> None:
    """Raise UserError for flags that name no process of a run, or more devices than a batch has examples."""
    batch = flags.config.batch_size
    if flags.devices is not None and flags.devices > batch and not flags.sweep:
        raise UserError(f"a batch of {batch} is less than {flags.devices} devices; use {batch} in all, or fewer")
    given = [name for name in TOGETHER if getattr(flags, name) is not None]
    if not flags.distributed:
        timed = [name for name in TIMES if getattr(flags, name) != getattr(ManyFlags, name)]
        for name in (*given, *timed):
            raise UserError(f"{_option(name)} is for a run of several processes; add --distributed")
        return
    if flags.seeds is not None or flags.sweep:
        raise UserError("--distributed is for one run, and --seeds and --sweep are for many; leave one out")
    for name in TIMES:
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
        raise UserError(f"--coordinator {coordinator} is no HOST:PORT; 10.0.0.1:1234, or [::1]:1234, say")
    if num_processes < 1:
        raise UserError(f"--num-processes {num_processes} are none; use 1 at least")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id {process_id} is none of {num_processes} processes, which are counted from 0; "
            f"use 0 to {num_processes - 1}"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
