"""One part of a run, from where it starts to its end or to a signal: trainer, recorder and saver at work."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping

from spec import signals
from spec.command_line import Flags
from spec.datasets import Dataset
from spec.datasets.dataset import sha256
from spec.errors import UserError
from spec.run import checkpoints, faults
from spec.run.checkpoints import Checkpoint
from spec.run.display import Display
from spec.run.history import START, EpochDone, Event, Position, StepsDone
from spec.run.pace import Pace
from spec.run.recorder import DivergedError, Recorder, mend
from spec.run.resume import Start
from spec.run.run_directory import RunDirectory
from spec.run.saving import Saver, parse_interval
from spec.run.trainer import Cancelled, Implementation, Trainer
from spec.signals import Stopped


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
        self.finite = True  # every number of the state, as far as the last event says
        diverging = flags.on_nonfinite != "stop"
        self.recorder = Recorder(self.recipe, trainer.counts, directory, display, diverging=diverging)
        self.history = self.recorder.history
        self.saver = Saver(
            directory,
            parse_interval(flags.checkpoint_every),
            keep=flags.keep_checkpoints,
            about=lambda: {
                "framework": implementation.framework,
                "recipe_sha256": checkpoints.recipe_hash(config["recipe"]),
                "data_sha256": self.data_sha256,
                "versions": config["versions"],
            },
            write_state=implementation.write_state,
        )

    @functools.cached_property
    def data_sha256(self) -> str:
        """Return the sha256 of the data set, read once."""
        return sha256(self.dataset)

    def begin(self, start: Start) -> None:
        """Put trainer, recorder and directory where the run starts. Raises UserError when it does not fit there."""
        found, folder = start.checkpoint, self.directory.folder / checkpoints.FOLDER
        if found:
            checkpoints.verify(found.path)  # once more: a run that goes on elsewhere may have removed it meanwhile
            self._check_fits(found)
            self.trainer.restore(self.read_state(self.trainer, found.path))
            self.recorder.go_on(found.history(), found.metrics())
            self.saver.saved = self.history.position if start.resume else None
        self.good, self.sound = self.history.position, self.trainer.snapshot()
        checkpoints.clean(folder, upto=found.step if found else 0)
        self.directory.begin(self.config, found.metrics() if found else b"")
        if self.flags.tensorboard:
            self.recorder.open_board(self.dataset)

    def _check_fits(self, found: Checkpoint) -> None:
        if found.manifest["data_sha256"] != self.data_sha256:
            raise UserError(
                f"the data are not those that {found.path} was trained on; give it the same, or begin anew in another "
                "--out"
            )
        position = Position(**found.history()["position"])
        finished = Position(self.recipe.epochs + 1, 0)
        if position == finished and found.manifest["recipe_sha256"] != checkpoints.recipe_hash(self.config["recipe"]):
            raise UserError(f"{found.path} has done all of --epochs {self.recipe.epochs}; give it more to go on with")
        if position > finished:
            done = position.epoch - 1
            raise UserError(
                f"--epochs {self.recipe.epochs} is less than the {done} that {found.path} has done; give it more"
            )

    def train(self) -> dict:
        """Train to the end; write metrics, checkpoints and weights, and return the summary."""
        with signals.deferred() as request, contextlib.closing(self.saver), contextlib.closing(self.recorder):
            self.request = request
            pace = Pace(
                rests=lambda position: self.saver.due(position, self.trainer.counts.steps_per_epoch),
                boundary=self.saver.interval.steps,
                stopped=self._stopped,
            )
            with self.display.running(self.trainer.counts):
                for event in self.trainer.events(start=self.history.position, pace=pace):
                    self._take(event)
            if self.history.position.epoch <= self.recipe.epochs:
                self._leave()
            state = self.trainer.state()
            self._save(due=self.finite)
            self.saver.wait()
            sha256 = self.directory.write_weights(state) if self.finite else None
            if sha256 is None:
                self.display.warning("no weights are written: the last state is not finite")
            self.recorder.finish()
        seconds = sum(figures["seconds"] for figures in self.recorder.epochs)
        return self.recorder.summary(seconds, self.trainer.compile_seconds) | {"weights_sha256": sha256}

    def _stopped(self) -> bool:
        """Return whether a signal has come, to this process or to another one of the run."""
        if not self.request.came() and (number := self.trainer.signal_elsewhere()):
            self.request.number = number
        return self.request.came()

    def _take(self, event: Event) -> None:
        """Record an event, and save when it is time; what is recorded is at most one save ahead of what is kept."""
        self.saver.check()
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
        self.finite = self.finite if ends else event.finite
        if ends or due:
            self._save(due=due)

    def _is_due(self, done: StepsDone) -> bool:
        return self.saver.due(Position(done.epoch, done.stop), self.trainer.counts.steps_per_epoch)

    def _save(self, *, due: bool = True) -> None:
        """Remember the state as it is now, and have it written if a checkpoint is `due`; unless it is spoiled."""
        if not self.finite:
            if due:
                self.display.warning(f"the state after step {self.history.step:,} is not finite, and not saved")
            return
        self.good, self.sound = self.history.position, self.trainer.snapshot()
        if due:
            evaluated = self.history.position.step == 0 and self.recorder.epochs
            score = self.recorder.epochs[-1]["test_accuracy"] if evaluated else None
            self.saver.save(self.sound, self.history, score=score)

    def _explain(self, bad: Position) -> None:
        """Raise DivergedError for a run that is no longer sound at `bad`, naming the step that spoiled it."""
        self.saver.wait()
        try:
            fault = faults.find(self.trainer, self.sound, self.good, bad, Pace(stopped=self._stopped))
        except Cancelled:
            message = f"stopped while looking for the step of epoch {bad.epoch} after which a number is not finite"
            raise Stopped(self.request.number, message) from None
        if fault is None:
            raise DivergedError(
                f"a number was not finite by epoch {bad.epoch}, step {bad.step - 1}, and all were when the steps were "
                f"done again: this device does not repeat itself; {mend(self.recipe)}"
            )
        dumped = ""
        if self.flags.dump_nonfinite:
            arrays = {**self.trainer.named(fault.snapshot), **faults.batch(self.recipe, self.dataset, fault)}
            dumped = f"; its batch and the state before it are in {self.directory.write_batch(arrays)}"
        raise DivergedError(f"{fault}: {mend(self.recipe)}{dumped}")

    def _leave(self) -> None:
        """Save what a signal left undone, and raise Stopped."""
        number, path = self.request.number, self.directory.path
        if self.history.position == START:
            raise Stopped(number, "stopped before the first step; nothing is saved")
        self._save()
        self.saver.wait()
        epoch, step = self.history.position
        saved = f"saved in {path}; --resume {path} goes on" if self.saver.saved == (epoch, step) else "nothing is saved"
        raise Stopped(number, f"stopped after epoch {epoch}, step {step:,}, {saved}")
