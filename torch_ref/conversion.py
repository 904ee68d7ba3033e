"""The command `python -m torch_ref.convert RUN_OR_FILE OUT`: a run, safetensors, torch's state dicts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from spec import conversion
from spec.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class Flags(conversion.Flags):
    """One conversion."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FILE")]
    """a run's directory, or a .safetensors or .pt file"""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """a .safetensors or .pt file, or the directory of a new run"""
    by_order: bool = False
    """give the arrays of a .pt file the recipe's names in order, if their shapes fit: 0.weight, 2.weight, ..."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; torch is imported only once the flags are known to be right, for a .pt file."""
    flags = conversion.parse(
        sys.argv[1:] if arguments is None else arguments,
        program="python -m torch_ref.convert",
        description="Convert weights between a run, .safetensors and torch's .pt state dicts.",
        kind=Flags,
        kinds=(conversion.RUN, conversion.SAFETENSORS, conversion.STATE_DICT),
    )
    kinds = conversion.kind_of(flags.source), conversion.kind_of(flags.target)
    if flags.by_order and kinds[0] != conversion.STATE_DICT:
        raise UserError(f"--by-order is for a .pt file: {flags.source} keeps no order; leave it out")
    if conversion.STATE_DICT not in kinds:
        conversion.run(flags)
        return
    require("torch", extra="torch")
    from torch_ref import state_dicts

    of_torch = conversion.StateDicts(state_dicts.read, state_dicts.to_bytes)
    conversion.run(flags, state_dicts=of_torch, by_order=flags.by_order)
