"""The checkpoints of a run: each a directory `checkpoints/STEP` that is whole or not there, and verified when read.

A checkpoint holds what a framework writes of its state, `history.json`, the `metrics.jsonl` so far, and, written last,
`manifest.json`: the step, the recipe's hash, the versions, and size and sha256 of every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec.errors import UserError
from spec.files import write_atomic

FOLDER, MANIFEST, HISTORY, METRICS = "checkpoints", "manifest.json", "history.json", "metrics.jsonl"
FORMAT = 1
UNTOLD = ("expected", "description", "name")  # of a recipe, what a run does not depend on
DIGITS = 8  # of a step in a name, so that names sort as steps do


class CheckpointError(UserError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it stands on the disk, its files verified."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Return the steps done since the run began."""
        return self.manifest["step"]

    def history(self) -> dict[str, Any]:
        """Return what `History.to_mapping` gave."""
        return json.loads((self.path / HISTORY).read_text("utf-8"))

    def metrics(self) -> bytes:
        """Return `metrics.jsonl` as it was then."""
        return (self.path / METRICS).read_bytes()


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """Return the sha256 of a resolved recipe's mapping: of all that a run depends on."""
    return _sha256(_canonical(told(recipe)))


def told(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe's mapping that a run depends on."""
    return {name: value for name, value in recipe.items() if name not in UNTOLD}


def write(
    folder: Path, *, step: int, about: Mapping[str, Any], files: Mapping[str, bytes], state: Callable[[Path], None]
) -> Path:
    """Write the checkpoint of `step` into `folder`: `files`, what `state` writes into a folder, and the manifest, which
    says `about` too. It appears under its name when it is whole and on the disk. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place, new = folder / _name(step), folder / f".{_name(step)}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        state(new)
        for name, content in files.items():
            (new / name).write_bytes(content)
        sizes = {str(path.relative_to(new)): _describe(path) for path in sorted(new.rglob("*")) if path.is_file()}
        manifest = {"format": FORMAT, "step": step, **about, "files": sizes}
        write_atomic(new / MANIFEST, _canonical(manifest | {"sha256": _sha256(_canonical(manifest))}))
        for path in (*new.rglob("*"), new):
            _sync(path)
        old = folder / f".{place.name}.old"
        if place.exists():
            place.rename(old)
        new.rename(place)
        _sync(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        recover(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    return place


def verify(path: Path, *, recipes: Collection[str] | None = None) -> Checkpoint:
    """Return the checkpoint at `path`. Raises CheckpointError, naming the file, when one is not as it was written, or
    is of a run whose recipe has none of the given hashes."""
    manifest = _manifest(path)
    if recipes is not None and manifest["recipe_sha256"] not in recipes:
        raise CheckpointError(
            f"{path / MANIFEST} is of a run of another recipe than config.json's; --resume-with-changes goes on with it"
        )
    if _name(manifest["step"]) != path.name:
        raise CheckpointError(f"{path / MANIFEST} is of step {manifest['step']:,}, and its folder is not")
    for name, (size, sha256) in manifest["files"].items():
        file = path / name
        try:
            if file.stat().st_size != size:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes; it was written with {size}")
            if _describe(file)[1] != sha256:
                raise CheckpointError(f"{file} is damaged: its sha256 is another than when it was written")
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    return Checkpoint(path, manifest)


def newest_good(
    folder: Path, *, recipes: Collection[str] | None = None
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """Return the last checkpoint of `folder` that `verify` takes, and what is wrong with each that is newer."""
    mistakes = []
    for path in reversed(_paths(folder)):
        try:
            return verify(path, recipes=recipes), mistakes
        except CheckpointError as error:
            mistakes.append(error)
    return None, mistakes


def recover(folder: Path) -> None:
    """Put back the checkpoints that were being replaced by others of their step when that was cut short."""
    for old in folder.glob(".*.old") if folder.is_dir() else ():
        place = folder / old.name.removeprefix(".").removesuffix(".old")
        if not place.exists():
            old.rename(place)


def clean(folder: Path, *, upto: int) -> None:
    """Remove what killed saves and removals left, and set checkpoints beyond step `upto`, which are not to be gone on
    with, aside as `STEP.damaged`."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)
    for path in _paths(folder):
        if int(path.name) > upto:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def prune(folder: Path, *, keep: int) -> None:
    """Remove all but the last `keep` checkpoints and the one with the best score, the first if several have it."""
    paths = _paths(folder)
    scores = {path: score for path in paths if (score := _score(path)) is not None}
    best = max(scores, key=scores.__getitem__, default=None)
    for path in paths[:-keep]:
        if path != best:
            _remove(path)


def _paths(folder: Path) -> list[Path]:
    """Return the folders that are named as checkpoints are, oldest first."""
    there = folder.iterdir() if folder.is_dir() else ()
    named = [path for path in there if re.fullmatch(rf"[0-9]{{{DIGITS},}}", path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name))


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        sha256 = manifest.pop("sha256")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{file} is damaged: it is no manifest") from None
    if _sha256(_canonical(manifest)) != sha256:
        raise CheckpointError(f"{file} is damaged: its sha256 is another than when it was written")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{file} has format {manifest['format']}; this version reads {FORMAT}")
    return manifest


def _score(path: Path) -> float | None:
    with suppress(CheckpointError):
        return _manifest(path)["score"]
    return None


def _remove(path: Path) -> None:
    """Remove a checkpoint: first its name, so that no half of one is ever seen."""
    gone = path.with_name(f".{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _describe(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _canonical(content: Mapping) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _name(step: int) -> str:
    return f"{step:0{DIGITS}d}"
