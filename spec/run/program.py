"""A trainer's whole program: flags in, run directory out; the same for both implementations."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spec import params
from spec.command_line import Flags
from spec.errors import UserError, require
from spec.recipe import Recipe, to_mapping
from spec.run import resume
from spec.run.display import Display
from spec.run.resume import Start
from spec.run.run_directory import SUMMARY, RunDirectory
from spec.run.saving import parse_interval
from spec.run.session import Session
from spec.run.trainer import Implementation
from spec.signals import Stopped

TOO_LATE = "the run was at its end: it is finished"  # what a signal found that came then


def run(flags: Flags, implementation: Implementation) -> Mapping:
    """Train as the flags say, write the run directory and print its last line; return the summary.

    Raises Stopped when a signal came, after saving what there is.
    """
    check(flags)
    display = Display(quiet=flags.quiet)
    start = resume.plan(flags, implementation.framework)
    with start.held or contextlib.nullcontext():
        for line in start.warnings:
            display.warning(line)
        for line in start.lines:
            display.line(line)
        if start.summary is not None:
            display.last_line(start.summary, start.out)
            return start.summary
        return _run(flags, implementation, start, display)


def _run(flags: Flags, implementation: Implementation, start: Start, display: Display) -> dict:
    recipe = flags.config
    device = implementation.select_device(**flags.devices_asked())
    trainer_of = implementation.prepare(recipe, device, skips=flags.on_nonfinite == "skip")
    dataset = implementation.load(recipe.data, data_dir=flags.data_dir, data_source=flags.data_source)
    made_by = origin(implementation, device)
    for line in _notes(start, made_by):
        display.line(line)
    display.line(f"{recipe.name}: {recipe.description}")
    with implementation.memory_explained():
        with display.waiting("compiling ..."):
            trainer = trainer_of(dataset)
        parameters = f"{params.num_parameters(trainer.leaves):,} parameters"
        display.line(f"{parameters}, {trainer.counts.steps:,} steps on {_on(made_by['devices'])}")
        overwrite = flags.overwrite and not start.resume
        with RunDirectory(
            start.out, recipe.name, overwrite=overwrite, resume=start.resume, held=start.held
        ) as directory:
            about = config(recipe, flags, made_by) | {"went_on_from": start.went_on_from}
            session = Session(trainer, dataset, directory, display, flags, implementation, about)
            session.begin(start)
            summary = session.train() | made_by
            directory.write_json(SUMMARY, summary)
    display.last_line(summary, directory.path)
    if session.request.came():  # too late to stop anything; whoever waits for the signal's status gets it
        raise Stopped(session.request.number, TOO_LATE)
    return summary


def _on(devices: Sequence[str]) -> str:
    kinds = sorted({name.rpartition(":")[0] for name in devices})
    return devices[0] if len(devices) == 1 else f"{len(devices)} devices: {', '.join(kinds)}"


def _notes(start: Start, made_by: Mapping) -> Iterator[str]:
    """Yield what a user should know of a run that others have worked at."""
    if start.held and start.held.stale:
        yield f"{start.out} was left by {start.held.stale}, which is no more: taken over"
    if start.checkpoint and start.checkpoint.manifest["versions"] != made_by["versions"]:
        yield "the checkpoint was made by other versions: last bits may part from those of an unbroken run"


def check(flags: Flags) -> None:
    """Raise UserError for flags that cannot be followed."""
    parse_interval(flags.checkpoint_every)
    if flags.tensorboard:
        require("tensorboardX", extra="tensorboard")
    if flags.dump_nonfinite and flags.on_nonfinite != "stop":
        raise UserError(
            f"--dump-nonfinite is for the step that a run stops at; leave out it or --on-nonfinite {flags.on_nonfinite}"
        )
    if flags.keep_checkpoints < 1:
        raise UserError(f"--keep-checkpoints {flags.keep_checkpoints} keeps none; use 1 at least")


def config(recipe: Recipe, flags: Flags, made_by: Mapping) -> dict:
    """Return what `config.json` holds: the resolved recipe, what made the run, and the flags."""
    return {"recipe": to_mapping(recipe), **made_by, "flags": _given(flags)}


def origin(implementation: Implementation, device: Any) -> dict:
    """Return what makes a run: the framework, its device, the versions."""
    packages = ("lockstep", "numpy", *implementation.packages)
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    devices = implementation.describe_devices(device)
    return {"framework": implementation.framework, "devices": devices, "versions": versions}


def _given(flags: Flags) -> dict:
    """Return the flags that are not recipe fields, paths as text."""
    names = ("recipe", "resume", "checkpoint_every", "keep_checkpoints", "on_nonfinite", "tensorboard")
    names += ("data_dir", "data_source", "platform", "quiet")
    values = {name: getattr(flags, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
