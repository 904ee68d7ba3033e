"""Many runs in one program: `--seeds N` and `--sweep FIELD=VALUE,...` of `python -m jax_impl.train`.

Runs whose programs differ in numbers alone, seeds and the optimiser's, are trained at once: every array of the state
has a leading axis of runs. Each run writes a run directory of its own, as if it had been trained alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jax_impl.convert import to_canonical
from jax_impl.optim import is_used, numbers_of
from jax_impl.parallel import Placement
from jax_impl.programs import check_fits
from jax_impl.stepper import Stepper, wait
from jax_impl.trainer import IMPLEMENTATION
from spec import sweep
from spec.datasets import Dataset
from spec.datasets.sizes import size_of
from spec.errors import UserError, require
from spec.files import write_atomic
from spec.recipe import Data, Recipe
from spec.run import run_directory
from spec.run.display import Display
from spec.run.history import EpochDone, Event, StepsDone
from spec.run.program import config, origin
from spec.run.recorder import DivergedError, Recorder
from spec.run.run_directory import SUMMARY, RunDirectory
from spec.sweep import ManyFlags, Setting, counted

TABLE, CHART = "table.md", "chart.png"
# Flags of `spec.run.program`, which saves what it can go on with; several runs at once do not.
CHECKPOINTS = (
    "resume",
    "resume_with_changes",
    "checkpoint_every",
    "keep_checkpoints",
    "on_nonfinite",
    "dump_nonfinite",
)
OF_ONE_RUN = (
    dict.fromkeys(CHECKPOINTS, "make no checkpoints")
    | dict.fromkeys(("parallel", "devices", "uneven"), "train on one device")
    | {"tensorboard": "write no event files"}
)


class ManyTrainer(Stepper):
    """Runs of `recipes`, which share a program (`program_key`), over `dataset`, compiled and ready to go."""

    def __init__(self, recipes: Sequence[Recipe], dataset: Dataset, placement: Placement) -> None:
        super().__init__(recipes[0], dataset, placement, runs=recipes)
        self.recipes = recipes

    def events(self) -> Iterator[tuple[int, Event]]:
        """Run every epoch of all runs, yielding what happens in each, by its index."""
        for epoch in range(1, self.recipe.epochs + 1):
            start = time.perf_counter()
            metrics, finite = self._run(epoch, 0, self.counts.steps_per_epoch)
            wait((*metrics, finite))
            trained = time.perf_counter() - start
            span = {"epoch": epoch, "start": 0, "stop": self.counts.steps_per_epoch, "seconds": trained}
            for run, (losses, correct, sound) in enumerate(zip(*map(np.asarray, (*metrics, finite)), strict=True)):
                yield run, StepsDone(**span, losses=losses, num_correct=correct, finite=bool(sound))
            tests = self._tests()
            seconds = time.perf_counter() - start - trained
            for run, (losses, correct) in enumerate(tests):
                yield run, EpochDone(epoch=epoch, seconds=seconds, test_losses=losses, test_correct=correct)

    def state(self, run: int) -> dict[str, np.ndarray]:
        """Return the present parameters and running statistics of one run, canonical names and layouts."""
        trained, batch_stats = jax.tree.map(lambda leaf: np.asarray(leaf)[run], self._state[:2])
        return to_canonical(trained, batch_stats, self.leaves)

    def _tests(self) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
        """Return each run's test losses and right answers; None without a test split."""
        metrics = self._tested()
        if metrics is None:
            return [(None, None)] * len(self.recipes)
        losses, predictions = map(np.asarray, metrics)
        return list(zip(losses, predictions == self.test_labels, strict=True))


def program_key(recipe: Recipe) -> Recipe:
    """Return what recipes must have alike to be trained by one program: all but the seed and the optimiser's numbers,
    of which only those that are used are told from the others."""
    used = {name: 1.0 for name, number in numbers_of(recipe.optimizer)._asdict().items() if is_used(number)}
    return dataclasses.replace(recipe, seed=0, optimizer=dataclasses.replace(recipe.optimizer, **used))


def run(flags: ManyFlags) -> dict:
    """Train the runs that the flags ask for, write their directories, the table and the summary; return the summary.

    Raises UserError when every run diverged, and for what `spec.run.program.run` refuses.
    """
    settings, seeds = sweep.plan(flags)
    runs = [
        (setting, dataclasses.replace(setting.recipe, seed=seed))
        for setting, seed in itertools.product(settings, seeds)
    ]
    _check(flags)
    placement = IMPLEMENTATION.select_device(flags.platform)
    datasets = {
        data: IMPLEMENTATION.load(data, data_dir=flags.data_dir, data_source=flags.data_source)
        for data in dict.fromkeys(setting.recipe.data for setting in settings)
    }
    for setting in settings:
        check_fits(setting.recipe, size_of(datasets[setting.recipe.data]))
    display = Display(quiet=flags.quiet)
    place = flags.out or run_directory.claim(f"{flags.config.name}-{'sweep' if flags.sweep else 'seeds'}")
    display.line(f"{flags.config.name}: {flags.config.description}")
    start = time.perf_counter()
    summaries = _train_all(runs, datasets, placement, place, flags, display)
    report = _report(flags, settings, seeds, summaries) | origin(IMPLEMENTATION, placement)
    report["seconds"] = time.perf_counter() - start
    _write(report, place, chart=bool(flags.sweep))
    _show(report, place, display)
    return report


def _train_all(
    runs: Sequence[tuple[Setting, Recipe]],
    datasets: Mapping[Data, Dataset],
    placement: Placement,
    place: Path,
    flags: ManyFlags,
    display: Display,
) -> list[dict | None]:
    """Train the runs, those that share a program at once, each into its folder in `place`; return their summaries."""
    groups: dict[Recipe, list[int]] = {}
    for index, (_, recipe) in enumerate(runs):
        groups.setdefault(program_key(recipe), []).append(index)
    made_by = origin(IMPLEMENTATION, placement)
    programs = f"{counted(len(runs), 'run')} in {counted(len(groups), 'program')}"
    display.line(f"{programs} on {made_by['devices'][0]}, written in {place}")
    folder_names, summaries = _folder_names(runs), {}
    for number, members in enumerate(groups.values(), start=1):
        recipes = [runs[index][1] for index in members]
        if len(groups) > 1:
            more = f" and {len(members) - 1} more" if len(members) > 1 else ""
            display.line(f"program {number} of {len(groups)}: {folder_names[members[0]]}{more}")
        folders = [place / folder_names[index] for index in members]
        with IMPLEMENTATION.memory_explained():
            with display.waiting("compiling ..."):
                trainer = ManyTrainer(recipes, datasets[recipes[0].data], placement)
            configs = [config(recipe, flags, made_by) for recipe in recipes]
            done = _train(trainer, configs, folders, made_by, display)
        summaries |= dict(zip(members, done, strict=True))
    return [summaries[index] for index in range(len(runs))]


def _check(flags: ManyFlags) -> None:
    """Raise UserError for what cannot be done, before anything is trained."""
    if flags.overwrite:
        raise UserError("--overwrite replaces one run, and these are many; name a new directory with --out")
    for field in dataclasses.fields(flags):
        if field.name in OF_ONE_RUN and getattr(flags, field.name) != field.default:
            flag = field.name.replace("_", "-")
            raise UserError(f"--{flag} is for one run; --seeds and --sweep {OF_ONE_RUN[field.name]}; leave it out")
    if flags.out:
        run_directory.check_usable(flags.out, overwrite=False, several=True)
    if flags.sweep:
        require("matplotlib", extra="plot")


def _train(
    trainer: ManyTrainer, configs: Sequence[Mapping], folders: Sequence[Path], made_by: Mapping, display: Display
) -> list[dict | None]:
    """Train runs that share a program, each into its folder; return their summaries, None for those that diverged."""
    with contextlib.ExitStack() as stack:
        recorders = []
        for recipe, content, folder in zip(trainer.recipes, configs, folders, strict=True):
            directory = stack.enter_context(RunDirectory(folder, recipe.name))
            directory.begin(content)
            recorders.append(Recorder(recipe, trainer.counts, directory, Display(quiet=True)))
        return _train_together(trainer, recorders, made_by, display)


def _train_together(
    trainer: ManyTrainer, recorders: Sequence[Recorder], made_by: Mapping, display: Display
) -> list[dict | None]:
    going = set(range(len(recorders)))
    start = time.perf_counter()
    with display.waiting(f"training {len(recorders)} runs ..."):
        for run, event in trainer.events():
            if run in going:
                try:
                    recorders[run].take(event)
                except DivergedError as error:
                    going.discard(run)
                    display.line(f"{recorders[run].directory.path.name} is out: {error}")
            if run == len(recorders) - 1 and isinstance(event, EpochDone):
                display.line(_epoch_line(event, trainer.counts.epochs, [recorders[run].epochs[-1] for run in going]))
            if not going:
                break
    seconds = time.perf_counter() - start
    return [
        _finish(recorder, trainer.state(run), seconds, trainer.compile_seconds, made_by) if run in going else None
        for run, recorder in enumerate(recorders)
    ]


def _finish(recorder: Recorder, state: Mapping, seconds: float, compile_seconds: float, made_by: Mapping) -> dict:
    """Write the weights and the summary of a run that came to its end; return the summary.

    The seconds are those of all the runs that were trained with it.
    """
    summary = recorder.summary(seconds, compile_seconds) | made_by
    summary["weights_sha256"] = recorder.directory.write_weights(state)
    recorder.directory.write_json(SUMMARY, summary)
    return summary


def _epoch_line(event: EpochDone, epochs: int, figures: Sequence[Mapping]) -> str:
    accuracies = [of["train_accuracy" if of["test_accuracy"] is None else "test_accuracy"] for of in figures]
    shown = list(dict.fromkeys(f"{end(accuracies):.4f}" for end in (min, max) if accuracies))
    reached = f"accuracy {' to '.join(shown)}" if shown else "every run is out"
    seconds = figures[0]["seconds"] if figures else event.seconds
    return f"epoch {event.epoch}/{epochs} done in {seconds:.2f} s  {counted(len(figures), 'run')}, {reached}"


def _report(
    flags: ManyFlags, settings: Sequence[Setting], seeds: Sequence[int], summaries: Sequence[Mapping | None]
) -> dict:
    """Return the summary of all: each setting with its runs' accuracies. Raises UserError when none is left."""
    if not any(summaries):
        raise UserError("every run diverged; lower the learning rate, or scale the inputs down")
    rows = []
    for index, setting in enumerate(settings):
        done = summaries[index * len(seeds) : (index + 1) * len(seeds)]
        rows.append(sweep.summary_row(setting.values, [summary and _accuracy(summary) for summary in done]))
    split = "train" if next(filter(None, summaries))["test_accuracy"] is None else "test"
    return {"recipe": flags.config.name, "seeds": list(seeds), "accuracy_of": split, "settings": rows}


def _accuracy(summary: Mapping) -> float:
    return summary["train_accuracy"] if summary["test_accuracy"] is None else summary["test_accuracy"]


def _write(report: Mapping, place: Path, *, chart: bool) -> None:
    try:
        write_atomic(place / SUMMARY, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
        write_atomic(place / TABLE, (sweep.markdown(report) + "\n").encode())
        if chart:
            sweep.chart(report, place / CHART)
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error}; name another --out") from None


def _show(report: Mapping, place: Path, display: Display) -> None:
    """Print the table, and a last line, quiet or not: the best setting."""
    for line in sweep.lines(report):
        display.line(line)
    best = max((row for row in report["settings"] if row["mean"] is not None), key=lambda row: row["mean"])
    display.result(f"{report['recipe']}: {sweep.sentence(report, best)}, {report['seconds']:.1f} s; {place}")


def _folder_names(runs: Sequence[tuple[Setting, Recipe]]) -> list[str]:
    """Return a name for each run's folder, numbered where two would be the same."""
    names: list[str] = []
    for setting, recipe in runs:
        name = "_".join(part for part in (setting.name, f"seed-{recipe.seed}") if part)
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names
