"""A run directory: `config.json`, `metrics.jsonl`, `summary.json`, `weights.safetensors`; the same of both sides."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from spec.errors import RunDirectoryError
from spec.files import write_atomic

FILES = ("config.json", "metrics.jsonl", "summary.json", "weights.safetensors")


def default_path(recipe_name: str) -> Path:
    """Return `runs/<recipe>-<date>-<time>` in the working directory, with a number behind it when that exists."""
    stem = Path("runs") / f"{recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = stem, 2
    while path.exists():
        path, number = stem.with_name(f"{stem.name}-{number}"), number + 1
    return path


def check_usable(path: Path, *, overwrite: bool) -> None:
    """Raise RunDirectoryError unless a run may be written at `path`: new, empty, or a run to overwrite."""
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"--out {path} is a file; name a directory that does not exist yet")
    there = sorted(item.name for item in _listing(path))
    if there and not overwrite:
        raise RunDirectoryError(
            f"--out {path} is not empty; name another directory, or add --overwrite to replace the run"
        )
    if strangers := [name for name in there if name not in FILES]:
        raise RunDirectoryError(
            f"--overwrite replaces a run, and {path} holds more: {', '.join(strangers[:3])}; name another directory"
        )
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"--out {path} cannot be written: no permission in {parent}; name another directory")


class RunDirectory:
    """Writes one run. Every write raises RunDirectoryError, naming the path, when the disk refuses."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        check_usable(path, overwrite=overwrite)
        self.path = path
        with self._explained():
            path.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                with suppress(FileNotFoundError):
                    (path / name).unlink()

    def write_json(self, name: str, content: Mapping) -> None:
        """Write `content` as a JSON file, whole or not at all; a number that is not finite is refused."""
        with self._explained():
            write_atomic(self.path / name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    def append_metrics(self, event: str, content: Mapping) -> None:
        """Append one line to `metrics.jsonl`, and flush it."""
        with self._explained(), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **content}, allow_nan=False) + "\n")

    def write_weights(self, state: Mapping[str, np.ndarray]) -> None:
        """Write the canonical state as safetensors, each array made contiguous first (a strided one is scrambled)."""
        from safetensors.numpy import save

        with self._explained():
            content = save({name: np.ascontiguousarray(array) for name, array in state.items()})
            write_atomic(self.path / "weights.safetensors", content)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirectoryError(
                f"the run directory {self.path} cannot be written: {error}; name another --out"
            ) from None


def _listing(path: Path) -> list[Path]:
    try:
        return list(path.iterdir()) if path.is_dir() else []
    except OSError as error:
        raise RunDirectoryError(f"--out {path} cannot be read: {error}; name another directory") from None
