"""A trainer's whole program: flags in, run directory out; the same for both implementations."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spec import params, run_directory
from spec.batches import Counts
from spec.command_line import Flags
from spec.datasets import Dataset
from spec.display import Display
from spec.history import Event
from spec.params import Leaf
from spec.recipe import Recipe, to_mapping
from spec.recorder import Recorder, refuse_nonfinite
from spec.run_directory import RunDirectory


class Trainer(Protocol):
    """One run of a recipe, ready to go: what the program needs of an implementation."""

    recipe: Recipe
    counts: Counts
    leaves: tuple[Leaf, ...]
    compile_seconds: float

    def events(self, *, steps_per_call: int | None = None) -> Iterator[Event]:
        """Run every epoch, yielding what happens."""

    def state(self) -> dict[str, np.ndarray]:
        """Return the present parameters and running statistics, canonical names and layouts."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A framework's parts of the program; `packages` are those whose versions a run depends on.

    `prepare` starts what needs no data, and returns what makes a trainer of the data.
    """

    framework: str
    packages: tuple[str, ...]
    select_device: Callable[[str | None], Any]
    describe_device: Callable[[Any], str]
    load: Callable[..., Dataset]
    prepare: Callable[[Recipe, Any], Callable[[Dataset], Trainer]]
    memory_explained: Callable[[], AbstractContextManager]


def run(flags: Flags, implementation: Implementation) -> dict:
    """Train as the flags say, write the run directory and print its last line; return the summary."""
    recipe = flags.config
    if flags.out:
        run_directory.check_usable(flags.out, overwrite=flags.overwrite)
    device = implementation.select_device(flags.platform)
    trainer_of = implementation.prepare(recipe, device)
    dataset = implementation.load(recipe.data, data_dir=flags.data_dir, data_source=flags.data_source)
    made_by = origin(implementation, device)
    display = Display(quiet=flags.quiet)
    display.line(f"{recipe.name}: {recipe.description}")
    with implementation.memory_explained():
        with display.waiting("compiling ..."):
            trainer = trainer_of(dataset)
        parameters = f"{params.num_parameters(trainer.leaves):,} parameters"
        display.line(f"{parameters}, {trainer.counts.steps:,} steps on {made_by['devices'][0]}")
        with RunDirectory(flags.out, recipe.name, overwrite=flags.overwrite) as directory:
            directory.write_json("config.json", config(recipe, flags, made_by))
            summary = _train(trainer, directory, display) | made_by
            directory.write_json("summary.json", summary)
    display.last_line(summary, directory.path)
    return summary


def _train(trainer: Trainer, directory: RunDirectory, display: Display) -> dict:
    """Train, writing metrics and weights; return the summary."""
    recipe = trainer.recipe
    recorder = Recorder(recipe, trainer.counts, directory, display)
    start = time.perf_counter()
    with display.running(trainer.counts):
        for event in trainer.events(steps_per_call=recipe.metrics.progress_every):
            recorder.take(event)
    seconds = time.perf_counter() - start
    state = trainer.state()
    refuse_nonfinite(state, recipe)
    directory.write_weights(state)
    return summarize(recipe, recorder.epochs, seconds, trainer.compile_seconds)


def summarize(recipe: Recipe, epochs: list[Mapping], seconds: float, compile_seconds: float) -> dict:
    """Return the summary of a finished run: counts, times, and the last epoch's figures."""
    last = epochs[-1]
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "precision": recipe.precision,
        "epochs": len(epochs),
        "steps": last["step"],
        "examples_seen": last["examples_seen"],
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        **{name: last[name] for name in ("train_loss", "train_accuracy", "cumulative_train_accuracy")},
        **{name: last[name] for name in ("test_loss", "test_accuracy", "lesson_metrics")},
    }


def config(recipe: Recipe, flags: Flags, made_by: Mapping) -> dict:
    """Return what `config.json` holds: the resolved recipe, what made the run, and the flags."""
    return {"recipe": to_mapping(recipe), **made_by, "flags": _given(flags)}


def origin(implementation: Implementation, device: Any) -> dict:
    """Return what makes a run: the framework, its device, the versions."""
    packages = ("lockstep", "numpy", *implementation.packages)
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    devices = [implementation.describe_device(device)]
    return {"framework": implementation.framework, "devices": devices, "versions": versions}


def _given(flags: Flags) -> dict:
    """Return the flags that are not recipe fields, paths as text."""
    names = ("recipe", "data_dir", "data_source", "platform", "quiet")
    values = {name: getattr(flags, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
