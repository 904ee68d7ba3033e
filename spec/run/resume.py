"""Where a run starts: anew, or from what a run directory holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spec.command_line import Flags
from spec.errors import RunDirectoryError, UserError
from spec.files import expanded
from spec.recipe import to_mapping
from spec.run import checkpoints, run_directory
from spec.run.checkpoints import Checkpoint, recipe_hash
from spec.run.display import Display
from spec.run.lock import RunLock
from spec.run.run_directory import CONFIG, SUMMARY

# What a state or a place in an epoch depends on.
FIXED = ("seed", "data", "batch_size", "last_batch", "model", "precision")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts: in the directory `out` (None: a new one), which `resume`s or is new or to overwrite; from
    `checkpoint`, or without one from the first step. `summary` is that of a run that has nothing left to do.

    `held` is the lock on a directory that is there already, `went_on_from` the hash of the recipe that the checkpoint
    was made by, `lines` say what is done, and `warnings` what was found that should not be.
    """

    out: Path | None
    held: RunLock | None = None
    resume: bool = False
    checkpoint: Checkpoint | None = None
    summary: Mapping[str, Any] | None = None
    went_on_from: str | None = None
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def plan(flags: Flags, framework: str) -> Start:
    """Return where the run that the flags ask for starts. Raises UserError for what cannot be gone on with."""
    named = flags.resume not in ("auto", "never")
    source = expanded(Path(flags.resume)) if named else flags.out
    run = run_directory.run_of(source) if named else source
    if source is None:
        return Start(out=None)
    in_place = run == source and flags.out in (None, run)
    if named and in_place and flags.overwrite:
        raise UserError(f"--resume {source} goes on with what --overwrite would replace; leave one of them out")
    if named and not in_place and flags.out in (None, run):
        raise UserError(f"--resume {source} goes back in {run}, which stays as it is; name a new directory with --out")
    anew = not named and (flags.overwrite or flags.resume == "never" or CONFIG not in run_directory.contents(run))
    if anew or not in_place:
        run_directory.check_usable(flags.out, overwrite=flags.overwrite)
    out = flags.out or run
    held = RunLock(out) if os.path.isdir(out) else None
    try:
        return Start(out=out, held=held) if anew else _go_on(run, source, out, held, flags, framework)
    except BaseException:
        if held:
            held.release()
        raise


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields by which two recipes' mappings differ, by their paths, with both values; None where there is
    none."""
    before, after = (dict(flat(checkpoints.told(recipe))) for recipe in (old, new))
    names = dict.fromkeys((*before, *after))
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _go_on(run: Path, source: Path, out: Path, held: RunLock | None, flags: Flags, framework: str) -> Start:
    """Return the start, in `out`, of what goes on from a run, or from one of its checkpoints if that is the source."""
    config = _config(run)
    changed = _check(run, config, flags, framework)
    summary = _summary(run)
    if out == run and summary is not None and not changed:
        lines = [f"{run} is finished; --overwrite does it again"]
        return Start(out=run, held=held, resume=True, summary=summary, lines=lines)
    recipes = None if flags.resume_with_changes else _recipes(config)
    if out == run:
        checkpoints.recover(run / checkpoints.FOLDER)
    if source == run:
        found, mistakes = checkpoints.newest_good(run / checkpoints.FOLDER, recipes=recipes)
    else:
        _check_kept(source)
        found, mistakes = checkpoints.verify(source, recipes=recipes), []
    if found is None and (mistakes or summary is not None or out != run):
        listed = "".join(f"\n  {mistake}" for mistake in mistakes)
        raise RunDirectoryError(f"{run} has no good checkpoint to go on from; name another --out{_few(listed)}")
    warnings = [f"not used: {mistake}" for mistake in mistakes]
    went_on_from = found.manifest["recipe_sha256"] if found else None
    start = {"out": out, "held": held, "resume": out == run, "checkpoint": found, "went_on_from": went_on_from}
    told = [f"{name}: {was} there, {now} here" for name, (was, now) in changed.items()]
    return Start(**start, lines=[_line(found, run), *told], warnings=warnings)


def _check_kept(checkpoint: Path) -> None:
    """Raise UserError, naming those that are there, for a checkpoint that is not."""
    if not os.path.isdir(checkpoint):
        kept = sorted(path.name for path in checkpoint.parent.glob("[0-9]*") if path.name.isdigit())
        there = f"there are {', '.join(kept)}" if kept else "there is none"
        raise UserError(f"--resume {checkpoint} is not kept; {there}")


def _line(found: Checkpoint | None, run: Path) -> str:
    if found is None:
        return f"{run} has no checkpoint yet: it begins anew"
    position = found.history()["position"]
    return f"going on from {found.path}, epoch {position['epoch']}, step {position['step']:,}"


def _recipes(config: Mapping[str, Any]) -> set[str]:
    """Return the hashes of the recipes that a checkpoint of the run may be of: its own, and the one it went on from."""
    return {recipe_hash(config["recipe"]), config.get("went_on_from")}


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
        if not isinstance(config["recipe"], Mapping):
            raise TypeError("its recipe is no table")
        return {name: config[name] for name in ("recipe", "framework", "versions")} | config
    except KeyError as error:
        raise RunDirectoryError(
            f"{run / CONFIG} has no {error.args[0]!r}: no trainer made it, so it has no checkpoint; name another --out"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise RunDirectoryError(f"{run / CONFIG} cannot be read: {error}; name another --out") from None


def _summary(run: Path) -> dict[str, Any] | None:
    """Return the summary of a run that ended; None where it is not whole, or the weights are not those it tells of: the
    last checkpoint gives both again."""
    try:
        summary = json.loads((run / SUMMARY).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(summary, Mapping) and summary.keys() >= set(Display.OUTCOME) | {"weights_sha256"}
    return summary if whole and summary["weights_sha256"] in (None, run_directory.weights_sha256(run)) else None


def flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a recipe's mapping by their paths: `model.hidden_sizes`."""
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
