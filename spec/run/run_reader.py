"""A run directory that is there, read and verified: its recipe, its weights, what it says of itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spec import params, recipe, weights
from spec.datasets.sizes import Size
from spec.errors import RunDirectoryError, python_command
from spec.recipe import Recipe
from spec.run.run_directory import CONFIG, SUMMARY, WEIGHTS
from spec.weights import Found

CHECKSUM = "weights_sha256"
MOST_BYTES = 10_000_000  # of a JSON file
TRAINERS = {"jax": "jax_impl.train", "torch": "torch_ref.train"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run with its weights, as they were found. `made_by` is the framework that trained it, None when they came from
    a file; `summary` is what `summary.json` holds, None where there is none."""

    path: Path
    recipe: Recipe
    made_by: str | None
    summary: Mapping[str, Any] | None
    found: Found

    def state(self, size: Size) -> dict[str, np.ndarray]:
        """Return the weights as the canonical state of the recipe's network over data of that size.

        Raises StateError, listing every mismatch, when they do not fit.
        """
        outputs = params.num_outputs(self.recipe, size.num_classes)
        leaves = params.leaves(self.recipe.model, size.input_shape, outputs)
        what = f"{self.path / WEIGHTS}, by the recipe in its config.json,"
        mend = "put back the two files that belong together, or train it again"
        return weights.check(self.found, leaves, self.recipe.precision, what=what, mend=mend)


def read(path: Path) -> Run:
    """Return the run at `path`, its weights verified by their checksum where it has one.

    Raises RunDirectoryError for what is no run, has no weights yet, or is damaged, RecipeError for its recipe and
    StateError for a file that is not safetensors, each with the mend.
    """
    path = path.expanduser()
    check_is_run(path)
    of = recipe.load(str(path / CONFIG))
    config = read_json(path / CONFIG)
    summary = read_json(path / SUMMARY) if os.path.exists(path / SUMMARY) else None
    named = config.get("framework")
    made_by = named if isinstance(named, str) and named in TRAINERS else None
    file = path / WEIGHTS
    if not os.path.exists(file) and summary is not None:
        raise RunDirectoryError(
            f"{path} is finished and has no weights.safetensors: its numbers were not finite, or the file was removed; "
            f"`{_resume(path, made_by)}` writes it again"
        )
    if not os.path.exists(file):
        raise RunDirectoryError(
            f"{path} has no weights.safetensors: the run is not finished; `{_resume(path, made_by)}` goes on with it"
        )
    content = weights.read_file(file)
    mend = f", or `{_resume(path, made_by)}`" if summary else ""
    _verify(content, file, (summary or {}).get(CHECKSUM) or config.get(CHECKSUM), mend=mend)
    found = weights.from_safetensors(content, source=str(file))
    return Run(path=path, recipe=of, made_by=made_by, summary=summary, found=found)


def sha256(content: bytes) -> str:
    """Return what a run keeps as its weights' checksum."""
    return hashlib.sha256(content).hexdigest()


def _resume(path: Path, made_by: str | None) -> str:
    return f"{python_command()} -m {TRAINERS[made_by or 'jax']} --resume {path}"


def _verify(content: bytes, file: Path, wanted: object, *, mend: str) -> None:
    if wanted is not None and (digest := sha256(content)) != wanted:
        raise RunDirectoryError(
            f"{file} is damaged: its sha256 is {digest}, and should be {weights.shown(str(wanted))}; put back a good "
            f"copy{mend}"
        )


def check_is_run(path: Path) -> None:
    """Raise RunDirectoryError, with the mend, unless a run is there."""
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise RunDirectoryError(f"{path} {what}; name a run's directory, as runs/NAME")
    if os.path.exists(path / CONFIG):
        return
    try:
        inside = sorted(folder.name for folder in path.iterdir() if os.path.exists(folder / CONFIG))
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}; name another run") from None
    if inside:
        several = f"{len(inside)} runs, {path / inside[0]} the first of them" if inside[1:] else str(path / inside[0])
        raise RunDirectoryError(f"{path} is no run, but holds {several}; name one")
    raise RunDirectoryError(f"{path} is no run directory: it has no config.json; name one that a trainer wrote")


def read_json(path: Path) -> dict[str, Any]:
    """Return the table that a JSON file of a run holds. Raises RunDirectoryError for anything else."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise RunDirectoryError(f"{path} has over {MOST_BYTES:,} bytes; a trainer writes less; put back its own")
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}; put back a good copy") from None
    if not isinstance(content, dict):
        raise RunDirectoryError(f"{path} holds a {type(content).__name__}, not a table; put back the trainer's own")
    return content
