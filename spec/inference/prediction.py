"""What a finished run makes of pictures: flags in, the likeliest classes out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from spec import datasets
from spec.command_line import parsed
from spec.datasets import Dataset, Split, preprocess
from spec.datasets.catalog import IDX_SETS
from spec.datasets.sizes import Size, known_size, size_of
from spec.errors import DataError
from spec.files import check_target, write_atomic
from spec.recipe import Recipe
from spec.run import run_reader
from spec.table import print_table, printable

if TYPE_CHECKING:
    from spec.inference.images import Picture

MOST_ROWS = 100
MOST_SKIPPED = 10
TOP = 3


@dataclass(frozen=True, kw_only=True)
class Flags:
    """One prediction."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """the run's directory"""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...")] = ()
    """image files, idx files of images (plain or .gz), folders of both"""
    invert: Literal["auto", "yes", "no"] = "auto"
    """turn dark on light into light on dark; auto: where the border is unlike that of the run's data"""
    json: Path | None = None
    """write every picture's probabilities to this file too"""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """where to run; an accelerator if there is one, unless given"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be predicted, all of it known to be right: the pictures, and `inputs` [n, h, w, c] float32, which the
    recipe's own preprocessing made of them; the canonical state; what a folder held besides."""

    recipe: Recipe
    state: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    pictures: list[Picture]
    inputs: np.ndarray
    skipped: list[tuple[Path, str]]


def parse(arguments: Sequence[str], *, program: str, description: str) -> Flags:
    """Return the flags; exit with 2 on a mistake. Raises UserError when `--json` names no file that can be written."""
    flags = parsed(Flags, arguments, prog=program, description=description)
    flags = replace(flags, json=flags.json and flags.json.expanduser())
    if not flags.images:
        raise DataError("no picture is named; give image files, idx files or folders after the run")
    if flags.json:
        check_target(flags.json, flag="--json")
    return flags


def read(flags: Flags) -> Request:
    """Return what the flags ask for. Raises UserError for a run or a picture that cannot be used."""
    from spec.inference import images

    run = run_reader.read(flags.run)
    size, class_names, dataset = _data(run.recipe)
    target = images.target_of(size, dataset)
    state = run.state(size)
    pictures, skipped = images.read(flags.images, target, invert=flags.invert)
    inputs = preprocessed(np.stack([picture.values for picture in pictures]), run.recipe, dataset)
    return Request(
        recipe=run.recipe, state=state, class_names=class_names, pictures=pictures, inputs=inputs, skipped=skipped
    )


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each class, float64 [n, classes]: the softmax of logits [n, classes]; of one logit
    [n, 1] the sigmoid, which is that of class 1.

    >>> probabilities(np.array([[0.0]])).tolist(), probabilities(np.array([[7.0, 7.0]])).tolist()
    ([[0.5, 0.5]], [[0.5, 0.5]])
    """
    logits = np.asarray(logits, np.float64)
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def preprocessed(values: np.ndarray, recipe: Recipe, dataset: Dataset | None) -> np.ndarray:
    """Return float32 inputs of raw examples [n, ...]: standardised by the training split, if the recipe says so."""
    given = Split(values, np.zeros(len(values), np.int32))
    if recipe.preprocessing.standardize:
        return preprocess(replace(dataset, test=given), recipe.preprocessing).test.inputs
    alone = Dataset(name="the pictures", train=given, test=None, class_names=())
    return preprocess(alone, recipe.preprocessing).train.inputs


def report(request: Request, logits: np.ndarray, flags: Flags) -> list[dict[str, Any]]:
    """Print the likeliest classes of each picture, write them to a file if asked to; return a dict a picture."""
    rows = [
        {"image": picture.name, "done": picture.done, "top": _top(row, request.class_names), "probabilities": list(row)}
        for picture, row in zip(request.pictures, probabilities(logits), strict=True)
    ]
    show(rows, request.skipped)
    if flags.json:
        skipped = [{"path": str(path), "reason": reason} for path, reason in request.skipped]
        content = {"run": str(flags.run), "recipe": request.recipe.name, "classes": list(request.class_names)}
        write_atomic(flags.json, (json.dumps(content | {"images": rows, "skipped": skipped}, indent=2) + "\n").encode())
    return rows


def show(rows: Sequence[dict[str, Any]], skipped: Sequence[tuple[Path, str]]) -> None:
    """Print what was skipped, and the table: a picture a row, its likeliest classes, and what was done to it."""
    for path, reason in skipped[:MOST_SKIPPED]:
        print(printable(f"skipped {path}: {reason}"))
    if len(skipped) > MOST_SKIPPED:
        print(f"skipped {len(skipped) - MOST_SKIPPED:,} files more")
    places = len(rows[0]["top"])
    headings = ["image", *("first", "second", "third")[:places], "as"]
    cells = [
        (row["image"], *(f"{one['class']} {one['probability']:.1%}" for one in row["top"]), row["done"] or "it is")
        for row in rows[:MOST_ROWS]
    ]
    print_table(headings, cells)
    if len(rows) > MOST_ROWS:
        print(f"and {len(rows) - MOST_ROWS:,} images more; --json FILE keeps them all")
        counts = Counter(row["top"][0]["class"] for row in rows).most_common()
        print("of all: " + ", ".join(f"{name} {number:,}" for name, number in counts))


def _top(row: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    likeliest = np.argsort(-row, kind="stable")[:TOP]
    return [{"class": class_names[index], "probability": float(row[index])} for index in likeliest]


def _data(recipe: Recipe) -> tuple[Size, tuple[str, ...], Dataset | None]:
    """Return the size of the recipe's data, its class names, and the data themselves where only they tell."""
    idx_set, size = IDX_SETS.get(recipe.data.name), known_size(recipe.data)
    if idx_set and not recipe.preprocessing.standardize:
        return size, idx_set.class_names, None
    if size and len(size.input_shape) == 1:
        return size, (), None  # no images: refused without a look at the data
    dataset = datasets.load(recipe.data)
    return size_of(dataset), dataset.class_names, dataset
