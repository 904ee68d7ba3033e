"""One part of a run, from where it starts to its end or to a signal: trainer, recorder and saver at work."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import numpy as np

from spec import signals
from spec.command_line import Flags
from spec.datasets import Dataset
from spec.errors import UserError
from spec.run import checkpoints, faults
from spec.run.display import Display
from spec.run.history import EpochDone, Event, Position, StepsDone
from spec.run.pace import Pace
from spec.run.recorder import DivergedError, Recorder, mend, refuse_nonfinite
from spec.run.resume import Start
from spec.run.run_directory import BATCH, WEIGHTS, RunDirectory
from spec.run.saving import Saver, parse_interval
from spec.run.trainer import Implementation, Trainer
from spec.signals import Stopped, StopRequest


class Session:
    """Trains into `directory` as the flags say; `config` is what `config.json` will hold."""

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset,
        directory: RunDirectory,
        display: Display,
        flags: Flags,
        implementation: Implementation,
        config: Mapping,
    ) -> None:
        self.trainer, self.dataset, self.directory, self.display = trainer, dataset, directory, display
        self.recipe, self.flags, self.config = trainer.recipe, flags, config
        self.read_state = implementation.read_state
        diverging = flags.on_nonfinite != "stop"
        self.recorder = Recorder(self.recipe, trainer.counts, directory, display, diverging=diverging)
        self.history = self.recorder.history
        self.saver = Saver(
            directory,
            parse_interval(flags.checkpoint_every),
            keep=flags.keep_checkpoints,
            about={
                "framework": implementation.framework,
                "recipe_sha256": checkpoints.recipe_hash(config["recipe"]),
                "versions": config["versions"],
            },
            write_state=implementation.write_state,
        )

    def begin(self, start: Start) -> None:
        """Put trainer, recorder and directory where the run starts."""
        found, folder = start.checkpoint, self.directory.folder / checkpoints.FOLDER
        if found:
            self.trainer.restore(self.read_state(self.trainer, found.path))
            self.recorder.go_on(found.history(), found.metrics())
            if self.history.position.step > self.trainer.counts.steps_per_epoch:
                raise UserError(f"{found.path} is at step {self.history.position.step} of a longer epoch")
        self.good, self.sound = self.history.position, self.trainer.snapshot()
        checkpoints.clean(folder, upto=found.step if found else 0)
        self.directory.begin(self.config, found.metrics() if found else b"")

    def train(self) -> dict:
        """Train to the end; write metrics, checkpoints and weights, and return the summary."""
        with signals.deferred() as request, contextlib.closing(self.saver):
            pace = Pace(
                rests=lambda position: self.saver.due(position, self.trainer.counts.steps_per_epoch),
                boundary=self.saver.interval.steps,
                stopped=request.came,
            )
            with self.display.running(self.trainer.counts):
                for event in self.trainer.events(start=self.history.position, pace=pace):
                    self._take(event)
            if self.history.position.epoch <= self.recipe.epochs:
                self._leave(request)
            state = self.trainer.state()
            if self.flags.on_nonfinite != "ignore":
                refuse_nonfinite(state, self.recipe)
            self._save(self.recorder.epochs[-1]["test_accuracy"])
            self.saver.wait()
            sha256 = self.directory.write_arrays(WEIGHTS, state) if _is_finite(state) else None
        seconds = sum(figures["seconds"] for figures in self.recorder.epochs)
        return self.recorder.summary(seconds, self.trainer.compile_seconds) | {"weights_sha256": sha256}

    def _take(self, event: Event) -> None:
        """Record an event, and save when it is time; what is recorded is at most one save ahead of what is kept."""
        ends = isinstance(event, EpochDone)
        due = self.saver.due_at_epochs_end() if ends else event.at_rest and self._is_due(event)
        if due:
            self.saver.wait()
        try:
            self.recorder.take(event)
        except DivergedError:
            if ends:
                raise
            self._explain(Position(event.epoch, event.stop))
        if ends or due:
            self._save(self.recorder.epochs[-1]["test_accuracy"] if ends else None, due=due)

    def _is_due(self, done: StepsDone) -> bool:
        return self.saver.due(Position(done.epoch, done.stop), self.trainer.counts.steps_per_epoch)

    def _save(self, score: float | None = None, *, due: bool = True) -> None:
        """Remember the state as it is now, and have it written if a checkpoint is `due`; unless it is spoiled."""
        snapshot = self.trainer.snapshot()
        if self.flags.on_nonfinite == "ignore" and not _is_finite(self.trainer.state()):
            self.display.line(f"the state after step {self.history.step:,} is not finite, and not saved")
            return
        self.good, self.sound = self.history.position, snapshot
        if due:
            self.saver.save(snapshot, self.history, score=score)

    def _explain(self, bad: Position) -> None:
        """Raise DivergedError for a run that is no longer sound at `bad`, naming the step that spoiled it."""
        fault = faults.find(self.trainer, self.sound, self.good, bad)
        dumped = ""
        if self.flags.dump_nonfinite:
            self.trainer.restore(fault.snapshot)
            self.directory.write_arrays(BATCH, self.trainer.state() | faults.batch(self.recipe, self.dataset, fault))
            dumped = f"; its batch and the state before it are in {self.directory.path / BATCH}"
        self.saver.wait()
        raise DivergedError(f"{fault}: {mend(self.recipe)}{dumped}")

    def _leave(self, request: StopRequest) -> None:
        """Save what a signal left undone, and raise Stopped."""
        self._save()
        self.saver.wait()
        epoch, step = self.history.position
        path = self.directory.path
        saved = "nothing saved" if self.saver.interval.never else f"saved in {path}; --resume {path} goes on"
        raise Stopped(request.number, f"stopped after epoch {epoch}, step {step:,}, {saved}")


def _is_finite(state: Mapping[str, np.ndarray]) -> bool:
    return all(np.isfinite(array).all() for array in state.values())
