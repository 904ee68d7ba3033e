"""A run directory: `config.json`, `metrics.jsonl`, `summary.json`, `weights.safetensors`; the same of both sides."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from spec.errors import RunDirectoryError
from spec.files import write_atomic

FILES = ("config.json", "metrics.jsonl", "summary.json", "weights.safetensors")


def check_usable(path: Path, *, overwrite: bool, several: bool = False) -> None:
    """Raise RunDirectoryError unless a run may be written at `path`: new, empty, or a run to overwrite.

    Where it is to hold `several` runs, none can be overwritten.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise RunDirectoryError(f"--out {path} is a file; name a directory that does not exist yet")
    there = sorted(item.name for item in _listing(path))
    if there and not overwrite:
        replace = "" if several else ", or add --overwrite to replace the run"
        raise RunDirectoryError(f"--out {path} is not empty; name another directory{replace}")
    if strangers := [name for name in there if name not in FILES]:
        raise RunDirectoryError(
            f"--overwrite replaces a run, and {path} holds more: {', '.join(strangers[:3])}; name another directory"
        )
    parent = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    if not os.path.isdir(parent):
        raise RunDirectoryError(f"--out {path} cannot be written: {parent} is a file; name another directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"--out {path} cannot be written: no permission in {parent}; name another directory")


class RunDirectory:
    """Writes one run, as a context manager. Every write raises RunDirectoryError, naming the path, if the disk refuses.

    Without a path it claims `runs/<recipe>-<date>-<time>`, counted up until it is new. To overwrite, it writes beside
    the old run, which is there until the new one is whole: a body that raises leaves the old run as it was.
    """

    def __init__(self, path: Path | None, recipe_name: str, *, overwrite: bool = False) -> None:
        if path:
            check_usable(path, overwrite=overwrite)
        self.path = path or claim(recipe_name)
        self._replaces = bool(_listing(self.path))
        place = self.path.absolute()
        self._folder = place.with_name(f".{place.name}.new") if self._replaces else place
        with self._explained():
            if self._replaces:
                shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed
            self._folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._replaces:
            return
        if kind is None:
            with self._explained():
                for name in FILES:
                    (self._folder / name).replace(self.path / name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def write_json(self, name: str, content: Mapping) -> None:
        """Write `content` as a JSON file, whole or not at all; a number that is not finite is refused."""
        with self._explained():
            write_atomic(self._folder / name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    def append_metrics(self, event: str, content: Mapping) -> None:
        """Append one line to `metrics.jsonl`, and flush it."""
        with self._explained(), (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **content}, allow_nan=False) + "\n")

    def write_weights(self, state: Mapping[str, np.ndarray]) -> None:
        """Write the canonical state as safetensors, each array made contiguous first (a strided one is scrambled)."""
        from safetensors.numpy import save

        with self._explained():
            content = save({name: np.ascontiguousarray(array) for name, array in state.items()})
            write_atomic(self._folder / "weights.safetensors", content)

    @contextmanager
    def _explained(self) -> Iterator[None]:
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
