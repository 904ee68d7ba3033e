"""A run directory: `config.json`, `metrics.jsonl`, `summary.json`, `weights.safetensors`, `checkpoints/`; the same of
both sides."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from spec.errors import RunDirectoryError
from spec.files import is_leftover, write_atomic
from spec.run import checkpoints
from spec.run.lock import HOLDER, LOCK, RunLock
from spec.weights import to_safetensors

CONFIG, METRICS, SUMMARY, WEIGHTS = "config.json", checkpoints.METRICS, "summary.json", "weights.safetensors"
BATCH, TENSORBOARD = "nonfinite.safetensors", "tensorboard"
OUTCOME = (SUMMARY, WEIGHTS)  # of a finished run alone
ASIDE = ".checkpoints.old"  # those of a run that is being replaced
PLOTS = "plots"
MADE = (PLOTS, TENSORBOARD)  # folders made of the rest, and gone with it when a run is replaced
CONTENT = (CONFIG, METRICS, *OUTCOME, BATCH, checkpoints.FOLDER, *MADE)


def check_usable(path: Path, *, overwrite: bool, several: bool = False) -> None:
    """Raise RunDirectoryError unless a run may be written at `path`: new, empty, or a run to overwrite.

    Where it is to hold `several` runs, none can be overwritten.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise RunDirectoryError(f"--out {path} is a file; name a directory that does not exist yet")
    there = contents(path)
    if there and not overwrite:
        replace = ", or add --overwrite to replace the run" if CONFIG in there else ""
        replace = "; several runs at once are not gone on with" if several else replace
        raise RunDirectoryError(f"--out {path} is not empty; name another directory{replace}")
    if strangers := [name for name in there if name not in CONTENT]:
        raise RunDirectoryError(
            f"--overwrite replaces a run, and {path} holds more: {', '.join(strangers[:3])}; name another directory"
        )
    parent = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    if not os.path.isdir(parent):
        raise RunDirectoryError(f"--out {path} cannot be written: {parent} is a file; name another directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"--out {path} cannot be written: no permission in {parent}; name another directory")


def run_of(path: Path) -> Path:
    """Return the run directory that `path` is, or is a checkpoint of. Raises RunDirectoryError for anything else."""
    for run in (path, path.parent.parent):
        if os.path.isfile(run / CONFIG):
            return run
        if os.path.isdir(run / checkpoints.FOLDER):
            raise RunDirectoryError(f"--resume {path}: {run} has checkpoints and no {CONFIG}; put that back")
    raise RunDirectoryError(
        f"--resume {path} is neither a run directory nor one of its checkpoints; name one, or use auto or never"
    )


def contents(path: Path) -> list[str]:
    """Return the names of what is in a directory, sorted, our hidden ones left out; none if there is no directory.

    Raises RunDirectoryError when it cannot be read.
    """
    return sorted(item.name for item in _listing(path) if item.name not in (LOCK, HOLDER) and not _is_left(item.name))


def _is_left(name: str) -> bool:
    """Return whether a killed process left it."""
    return name == ASIDE or is_leftover(name, of=(*CONTENT, HOLDER))


def weights_sha256(path: Path) -> str | None:
    """Return the sha256 of a run's weights as they are; None where they are not there."""
    file = path / WEIGHTS
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


class RunDirectory:
    """Writes one run, as a context manager. Every write raises RunDirectoryError, naming the path, if the disk refuses.

    Without a path it claims `runs/<recipe>-<date>-<time>`, counted up until it is new. To `resume`, it goes on with the
    run that is there. To overwrite, it writes beside the old run, which is there until the new one is whole or has
    `settle`d: a body that raises leaves the old run as it was. One process at a time writes a directory: whoever has
    the lock `held`, which is taken here unless it is given.
    """

    def __init__(
        self,
        path: Path | None,
        recipe_name: str,
        *,
        overwrite: bool = False,
        resume: bool = False,
        held: RunLock | None = None,
    ) -> None:
        if path and not resume:
            check_usable(path, overwrite=overwrite)
        self.path = path or claim(recipe_name)
        replaces = overwrite and bool(contents(self.path))
        place = self.path.absolute()
        self.folder = place.with_name(f".{place.name}.new") if replaces else place
        with self.explained():
            self.path.mkdir(parents=True, exist_ok=True)
            self.held = held or RunLock(self.path)
            self._clean()
            self.folder.mkdir(exist_ok=True)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.settle()
        if self._replaces:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.held.release()

    def _clean(self) -> None:
        """Remove what killed processes left: a run that was to take this one's place, and files half-written."""
        place = self.path.absolute()
        shutil.rmtree(place.with_name(f".{place.name}.new"), ignore_errors=True)
        shutil.rmtree(place / ASIDE, ignore_errors=True)
        for item in _listing(place):
            if _is_left(item.name):
                item.unlink(missing_ok=True)

    @property
    def _replaces(self) -> bool:
        return self.folder != self.path.absolute()

    def settle(self) -> None:
        """Put the new run in the place of the one that it replaces, if it does.

        The outcome of the old one goes first, that of the new one comes last, after its `config.json`: wherever this is
        cut short, no outcome stands beside another run's recipe.
        """
        if not self._replaces:
            return
        aside = self.path / ASIDE
        with self.explained():
            for name in OUTCOME:
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            for name in MADE:
                shutil.rmtree(self.path / name, ignore_errors=True)
            if (self.path / checkpoints.FOLDER).exists():
                (self.path / checkpoints.FOLDER).rename(aside)
            for name in (checkpoints.FOLDER, TENSORBOARD, BATCH, METRICS, CONFIG, WEIGHTS, SUMMARY):
                new = self.folder / name
                if new.exists():
                    new.replace(self.path / name)
                else:
                    (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = self.path.absolute()

    def begin(self, config: Mapping, metrics: bytes = b"") -> None:
        """Write what a run starts with, in the place of whatever an earlier part of it left."""
        with self.explained():
            for name in OUTCOME:
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / TENSORBOARD, ignore_errors=True)
        self.write_json(CONFIG, config)  # first, for it tells a run from any other directory
        with self.explained():
            write_atomic(self.folder / METRICS, metrics)

    def metrics(self) -> bytes:
        """Return `metrics.jsonl` as it is now."""
        with self.explained():
            return (self.folder / METRICS).read_bytes()

    def write_json(self, name: str, content: Mapping) -> None:
        """Write `content` as a JSON file, whole or not at all; a number that is not finite is refused."""
        with self.explained():
            write_atomic(self.folder / name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    def append_metrics(self, event: str, content: Mapping) -> None:
        """Append one line to `metrics.jsonl`, and flush it."""
        with self.explained(), (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **content}, allow_nan=False) + "\n")

    def write_weights(self, state: Mapping[str, np.ndarray]) -> str:
        """Write the canonical state as safetensors; return the file's sha256."""
        content = to_safetensors(state)
        with self.explained():
            write_atomic(self.folder / WEIGHTS, content)
        return hashlib.sha256(content).hexdigest()

    def write_batch(self, arrays: Mapping[str, np.ndarray]) -> Path:
        """Write a batch that spoiled a run, and what belongs to it, as safetensors; return the file, which stays though
        the run does not."""
        with self.explained():
            write_atomic(self.path / BATCH, to_safetensors(arrays))
        return self.path / BATCH

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what the disk refuses in the body into a RunDirectoryError."""
        try:
            yield
        except OSError as error:
            raise RunDirectoryError(
                f"the run directory {self.path} cannot be written: {error}; name another --out"
            ) from None


def claim(name: str) -> Path:
    """Make and return a new directory `runs/<name>-<date>-<time>`; two that start in the same second get two."""
    return _claim(f"{name}-{time.strftime('%Y%m%d-%H%M%S')}", 1)


def _claim(stem: str, number: int) -> Path:
    path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return _claim(stem, number + 1)
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be made: {error}; name another place with --out") from None
    return path


def _listing(path: Path) -> list[Path]:
    try:
        return list(path.iterdir()) if os.path.isdir(path) else []
    except OSError as error:
        raise RunDirectoryError(f"--out {path} cannot be read: {error}; name another directory") from None
