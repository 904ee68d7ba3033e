"""When a run saves, and the thread that does it: a checkpoint costs the training as little as it can."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spec.errors import UserError
from spec.run import checkpoints
from spec.run.history import History, Position
from spec.run.run_directory import RunDirectory

SHARE = 0.02  # of the time may go into saving, unless a user says how often to save
SECONDS_OF_A_SAVE = 0.2  # until one was timed
LONGEST = 300.0  # seconds between two, unless a user says so
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """How often a run saves: every `steps` steps or `seconds` seconds, and at every epoch's end, or with `share` at the
    epochs' ends that leave saving no more than that share of the time; or `never`."""

    steps: int | None = None
    seconds: float | None = None
    share: float | None = None
    never: bool = False


def parse_interval(text: str) -> Interval:
    """Return the interval that `--checkpoint-every` gave. Raises UserError for what is none."""
    if text == "auto":
        return Interval(seconds=LONGEST, share=SHARE)
    if text in ("epoch", "never"):
        return Interval(never=text == "never")
    number = re.fullmatch(r"([0-9]{1,12})([smh]?)", text)
    if not number or int(number[1]) == 0:
        raise UserError(
            f"--checkpoint-every {text} is no interval; use steps (500), time (30s, 5m, 1h), epoch, auto or never"
        )
    if number[2]:
        return Interval(seconds=float(int(number[1]) * _UNITS[number[2]]))
    return Interval(steps=int(number[1]))


class Saver:
    """Writes the checkpoints of a run into `directory`, one at a time, in a thread of its own.

    `about` returns what every manifest says, and `write_state` writes what a trainer's `snapshot` gave into a folder.
    The last `keep` checkpoints stay, and the best; `saved` is the position of the last. What goes wrong is raised by
    the next call, as a RunDirectoryError.
    """

    def __init__(
        self,
        directory: RunDirectory,
        interval: Interval,
        *,
        keep: int,
        about: Callable[[], Mapping[str, Any]],
        write_state: Callable[[Any, Path], None],
    ) -> None:
        self.directory, self.interval = directory, interval
        self._keep, self._about, self._write_state = keep, about, write_state
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._saving: Future | None = None
        self.saved: Position | None = None
        self._began = time.monotonic()
        self._seconds = SECONDS_OF_A_SAVE

    def due(self, position: Position, steps_per_epoch: int) -> bool:
        """Return whether a checkpoint is to be written at `position`, in the middle of an epoch."""
        interval = self.interval
        if position.step == steps_per_epoch:
            return False  # the evaluation comes first
        if interval.steps:
            return ((position.epoch - 1) * steps_per_epoch + position.step) % interval.steps == 0
        return interval.seconds is not None and time.monotonic() - self._began >= interval.seconds

    def due_at_epochs_end(self) -> bool:
        """Return whether a checkpoint is to be written after an epoch's evaluation."""
        if self.interval.never:
            return False
        return not self.interval.share or (time.monotonic() - self._began) * self.interval.share >= self._seconds

    def save(self, snapshot: Any, history: History, *, score: float | None) -> None:
        """Have a checkpoint written of what `snapshot` and `history` hold now, once the last one is."""
        if self.interval.never or self.saved == history.position:
            return
        self.wait()
        self._began, self.saved = time.monotonic(), history.position
        files = {
            checkpoints.HISTORY: json.dumps(history.to_mapping(), allow_nan=False).encode(),
            checkpoints.METRICS: self.directory.metrics(),
        }
        folder, step = self.directory.folder / checkpoints.FOLDER, history.step
        self._saving = self._thread.submit(self._write, folder, step, score, files, snapshot)

    def wait(self) -> None:
        """Return when nothing is being written; a run that replaces another one takes its place now."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        with self.directory.explained():
            saving.result()
        self.directory.settle()

    def check(self) -> None:
        """Do what `wait` does, if there is nothing to wait for: what was refused is not kept for the next save."""
        if self._saving and self._saving.done():
            self.wait()

    def close(self) -> None:
        """Let what is being written come to its end; nothing is raised."""
        self._thread.shutdown()

    def _write(self, folder: Path, step: int, score: float | None, files: Mapping[str, bytes], snapshot: Any) -> None:
        began = time.monotonic()
        about = {**self._about(), "score": score}
        checkpoints.write(folder, step=step, about=about, files=files, state=partial(self._write_state, snapshot))
        checkpoints.prune(folder, keep=self._keep)
        self._seconds = time.monotonic() - began
