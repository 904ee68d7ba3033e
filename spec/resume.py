"""Where a run starts: anew, or from what a run directory holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spec import checkpoints, lock, run_directory
from spec.checkpoints import Checkpoint
from spec.command_line import Flags
from spec.errors import RunDirectoryError, UserError
from spec.files import expanded
from spec.recipe import to_mapping
from spec.run_directory import CONFIG, SUMMARY

UNTOLD = ("expected", "description", "name")  # of a recipe, what a run does not depend on
FIXED = ("data", "batch_size", "last_batch", "model", "precision")  # what a state or a position in an epoch depends on


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts: in the directory `out` (None: a new one), which `resume`s or is new or to overwrite; from
    `checkpoint`, or without one from the first step. `summary` is that of a run that has nothing left to do.

    `lines` say what a user should know of it.
    """

    out: Path | None
    resume: bool = False
    checkpoint: Checkpoint | None = None
    summary: Mapping[str, Any] | None = None
    lines: list[str] = field(default_factory=list)


def plan(flags: Flags, framework: str) -> Start:
    """Return where the run that the flags ask for starts. Raises UserError for what cannot be gone on with."""
    if flags.resume not in ("auto", "never"):
        return _from(expanded(Path(flags.resume)), flags, framework)
    if flags.out is None:
        return Start(out=None)
    if flags.overwrite or flags.resume == "never" or CONFIG not in run_directory.contents(flags.out):
        run_directory.check_usable(flags.out, overwrite=flags.overwrite)
        if os.path.isdir(flags.out):
            lock.check_free(flags.out)
        return Start(out=flags.out)
    return _go_on(flags.out, flags, framework)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields by which two recipes' mappings differ, by their paths, with both values; None where there is
    none."""
    before, after = (dict(_flat({key: of[key] for key in of if key not in UNTOLD})) for of in (old, new))
    names = dict.fromkeys((*before, *after))
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _go_on(run: Path, flags: Flags, framework: str) -> Start:
    """Return the start of a run that goes on in its own directory."""
    lock.check_free(run)
    config = _config(run)
    changed = _check(run, config, flags, framework)
    summary = _summary(run)
    if summary is not None and not changed:
        return Start(out=run, resume=True, summary=summary, lines=[f"{run} is finished; --overwrite does it again"])
    found, mistakes = checkpoints.newest_good(run / checkpoints.FOLDER)
    if found is None and summary is not None:
        raise RunDirectoryError(f"{run} has no checkpoint to go on from; name another --out, or add --overwrite")
    lines = [f"not used: {mistake}" for mistake in mistakes]
    return Start(out=run, resume=True, checkpoint=found, lines=lines + _lines(found, run, config))


def _from(path: Path, flags: Flags, framework: str) -> Start:
    """Return the start of a run from that of `--resume PATH`, a run directory or one of its checkpoints."""
    run = run_directory.run_of(path)
    if run == path and flags.out in (None, run):
        if flags.overwrite:
            raise UserError(f"--resume {path} goes on with what --overwrite would replace; leave one of them out")
        return _go_on(run, flags, framework)
    if flags.out is None or flags.out == run:
        raise UserError(f"--resume {path} goes back in {run}, which stays as it is; name a new directory with --out")
    run_directory.check_usable(flags.out, overwrite=flags.overwrite)
    config = _config(run)
    _check(run, config, flags, framework)
    if run != path:
        found, mistakes = checkpoints.verify(path), []
    else:
        found, mistakes = checkpoints.newest_good(run / checkpoints.FOLDER)
    if found is None:
        raise UserError(f"--resume {path}: there is no checkpoint to go on from" + "".join(f"; {m}" for m in mistakes))
    lines = [f"not used: {mistake}" for mistake in mistakes]
    return Start(out=flags.out, checkpoint=found, lines=lines + _lines(found, run, config))


def _lines(found: Checkpoint | None, run: Path, config: Mapping) -> list[str]:
    if found is None:
        return [f"{run} has no checkpoint to go on from: it begins anew"]
    position = found.history()["position"]
    made_by = found.manifest["versions"]
    lines = [f"going on from {found.path}, epoch {position['epoch']}, step {position['step']:,}"]
    if made_by != config["versions"]:
        lines.append("it was made by other versions: its last bits may part from those of an unbroken run")
    return lines


def _check(run: Path, config: Mapping, flags: Flags, framework: str) -> dict[str, tuple[Any, Any]]:
    """Return the recipe's fields that the run does not share; raise UserError when it cannot be gone on with."""
    if config["framework"] != framework:
        raise UserError(
            f"{run} is a run of {config['framework']}, and this is {framework}; go on with the other trainer, or name "
            "another --out"
        )
    changed = differences(config["recipe"], to_mapping(flags.config))
    listed = "".join(f"\n  {name}: {was} there, {now} here" for name, (was, now) in changed.items())
    if changed and not flags.resume_with_changes:
        raise UserError(
            f"{run} is a run of another recipe; --resume {run} alone goes on with its own, --resume-with-changes with "
            f"this one, or name another --out:{_few(listed)}"
        )
    if fixed := [name for name in changed if name.split(".")[0] in FIXED or name == "optimizer.name"]:
        raise UserError(
            f"{run} cannot go on with another {', '.join(fixed)}: its state or its place in the epoch would not fit; "
            f"name another --out:{_few(listed)}"
        )
    return changed


def _few(listed: str) -> str:
    lines = listed.split("\n")
    return "\n".join(lines[:7] + [f"  and {len(lines) - 7} more"] * (len(lines) > 7))


def _config(run: Path) -> dict[str, Any]:
    try:
        config = json.loads((run / CONFIG).read_text("utf-8"))
        return {name: config[name] for name in ("recipe", "framework", "versions")} | config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{run / CONFIG} cannot be read: {error}; name another --out") from None


def _summary(run: Path) -> dict[str, Any] | None:
    """Return the summary of a run that ended; None where there is none, or one that cannot be read."""
    try:
        return json.loads((run / SUMMARY).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
