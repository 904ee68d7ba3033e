"""The pictures of runs: flags in, files out. What only a framework can say, the logits, it is given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import tyro

from spec import params
from spec.command_line import parsed
from spec.datasets import Dataset, Split
from spec.datasets.sizes import Size, size_of
from spec.errors import DataError, UserError, require
from spec.files import expanded
from spec.inference.prediction import probabilities
from spec.layers import layers
from spec.plots import confusion, filters, predictions, style, terminal
from spec.plots.curves import Curve, learning_curves
from spec.plots.network import network
from spec.recipe import DataSource
from spec.run import metrics, run_reader
from spec.run.metrics import Recorded
from spec.run.run_directory import PLOTS, SUMMARY, WEIGHTS
from spec.table import print_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pictures = Iterator[tuple[str, "Figure"]]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The pictures of one run, or of several over one another."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = ()
    """the runs' directories, of either framework"""
    out: Path | None = None
    """where the pictures go; unless given, a run's to RUN/plots, and what shows several to plots"""
    format: tuple[Literal["png", "svg"], ...] = style.FORMATS
    """png, svg, or both"""
    show: bool = False
    """show them in the terminal too, if it is kitty, Ghostty, Konsole, WezTerm or iTerm2"""
    split: Literal["test", "train"] | None = None
    """which split the network is asked about; test where there is one, unless given"""
    data_dir: Path | None = None
    """a directory that holds the idx files"""
    data_source: DataSource = "idx"
    """read the idx files, or the same examples through TFDS"""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """where to run; an accelerator if there is one, unless given"""


def parse(arguments: Sequence[str], *, program: str, description: str) -> tuple[Flags, list[Recorded]]:
    """Return the flags, and what the runs that they name recorded. Raises UserError for a run that cannot be read."""
    flags = parsed(Flags, arguments, prog=program, description=description)
    require("matplotlib", extra="plot")
    if not flags.runs:
        raise UserError("no run is named; give the directory of one, as runs/NAME, or of several")
    if not flags.format:
        raise UserError("--format names no format; use png, svg or both")
    paths = {name: expanded(path) for name in ("out", "data_dir") if (path := getattr(flags, name))}
    _refuse_the_same(flags.runs)
    return replace(flags, **paths), [metrics.read(run) for run in flags.runs]


def _refuse_the_same(runs: Sequence[Path]) -> None:
    places = [expanded(run).resolve() for run in runs]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UserError(
                f"{runs[index]} is named twice, the first time as {runs[places.index(place)]}; leave one out"
            )


class Album:
    """Saves pictures as the flags say, a line a file, and shows them if they are to be shown."""

    def __init__(self, flags: Flags) -> None:
        self.flags, self.unshown = flags, 0
        places = [expanded(run).resolve() for run in flags.runs]
        self._names = dict(zip(places, _distinct([place.name for place in places]), strict=True))

    def add(self, folder: Path, name: str, picture: Figure) -> None:
        """Save one picture, and show it where that can be done. Raises UserError where it cannot be saved."""
        formats = dict.fromkeys((*self.flags.format, *(["png"] if self.flags.show else [])))
        files = style.save(picture, folder, name, list(formats))
        print(*files, sep="\n")
        if self.flags.show:
            self.unshown += not terminal.show(folder / f"{name}.png")

    def close(self) -> None:
        """Raise UserError if pictures were to be shown, and could not be; all of them are written then."""
        if self.unshown:
            raise UserError(
                "--show: this is no terminal that shows pictures (kitty, Ghostty, Konsole, WezTerm, iTerm2); they are "
                "written, open them with another program, and leave --show out"
            )

    def of_run(self, run: Path) -> Path:
        """Return where the pictures of a run go."""
        if self.flags.out is None:
            return run / PLOTS
        return self.flags.out / self._names[run.resolve()] if len(self.flags.runs) > 1 else self.flags.out

    def of_all(self) -> Path:
        """Return where the picture of all runs goes."""
        if self.flags.out is None:
            return Path(PLOTS) if len(self.flags.runs) > 1 else self.of_run(self.flags.runs[0])
        return self.flags.out


def draw_curves(album: Album, recorded: Sequence[Recorded]) -> None:
    """Draw the learning curves of all runs over one another; say what is not in them, and how far runs part."""
    for of in recorded:
        if of.cut:
            print(f"{of.path}: the last line of its metrics.jsonl was cut short, and is left out")
        if (of.path / WEIGHTS).exists() and len(of.epochs) < of.recipe.epochs:
            print(
                f"{of.path}: its weights are of epoch {of.recipe.epochs}, its metrics.jsonl ends with epoch "
                f"{len(of.epochs)}, and so do its curves"
            )
    curves = [
        Curve(label=label, planned=of.recipe.epochs, epochs=of.epochs, progress=of.progress)
        for of, label in zip(recorded, _labels(recorded), strict=True)
    ]
    album.add(album.of_all(), "curves", learning_curves(curves))
    if len(recorded) > 1:
        print(parting(curves))


def parting(curves: Sequence[Curve]) -> str:
    """Return how far the test accuracies of all runs part at most, over the epochs that all have."""
    common = min(len(curve.epochs) for curve in curves)
    found = [[curve.epochs[epoch]["test_accuracy"] for curve in curves] for epoch in range(common)]
    if not found or any(accuracy is None for row in found for accuracy in row):
        return "the runs have no epoch with a test accuracy in common"
    spreads = [max(row) - min(row) for row in found]
    most = int(np.argmax(spreads))
    return f"test accuracies part by {spreads[most]:.4f} at most, after epoch {most + 1} of {common}"


def unfinished(of: Recorded) -> str | None:
    """Return why a run has no more pictures than its curves; None where it has."""
    if (of.path / WEIGHTS).exists():
        return None
    why = "its numbers were not finite, or the file was removed" if (of.path / SUMMARY).exists() else "it is unfinished"
    return f"{of.path} has no {WEIGHTS} ({why}): its curves are all there is to draw"


class Asked(NamedTuple):
    """What a network is asked about: raw `examples`, those of the `split` "test" or "training" of a data set of that
    `size`."""

    split: str
    examples: Split
    class_names: tuple[str, ...]
    size: Size


def asked(of: Recorded, dataset: Dataset, split: str | None) -> Asked:
    """Return what the flag asks about; the test split where there is one, unless given. Raises DataError without it."""
    if split == "test" and dataset.test is None:
        raise DataError(f"{of.recipe.name} holds no example out (data.test_fraction is 0); use --split train")
    if dataset.test is None:
        print(f"{of.recipe.name} holds no example out: its network is asked about the training split")
    about = ("test", dataset.test) if dataset.test and split != "train" else ("training", dataset.train)
    return Asked(*about, dataset.class_names, size_of(dataset))


def draw_predictions(
    album: Album, of: Recorded, about: Asked, state: Mapping[str, np.ndarray], logits: np.ndarray
) -> None:
    """Draw what the network of a run makes of the examples, of which `logits` [n, outputs] are given; and print the
    table of their classes."""
    folder = album.of_run(of.path)
    chances = probabilities(logits)
    matrix = confusion.counts(about.examples.labels, chances.argmax(axis=1), len(about.class_names))
    for name, picture in _pictures(of, about, state, chances, matrix):
        album.add(folder, name, picture)
    print_table(confusion.HEADINGS, confusion.rows(matrix, about.class_names), right=confusion.HEADINGS[1:])


def _pictures(
    of: Recorded, about: Asked, state: Mapping[str, np.ndarray], chances: np.ndarray, matrix: np.ndarray
) -> Pictures:
    labels, names, size = about.examples.labels, about.class_names, about.size
    accuracy = f"{matrix.trace() / matrix.sum():.4f}"
    made_by = f"{of.recipe.name}, trained by {of.framework}"
    title = f"{made_by}: accuracy {accuracy} on {len(labels):,} {about.split} examples"
    yield "confusion", confusion.confusion(matrix, names, title=title)
    yield "classes", confusion.classes(matrix, names, title=title)
    leaves = params.leaves(of.recipe.model, size.input_shape, params.num_outputs(of.recipe, size.num_classes))
    yield "network", network(layers(of.recipe, size))
    yield "first_layer", filters.first_layer(leaves, state, title=f"{made_by}: weights of the first layer")
    if len(size.input_shape) != 3 or size.input_shape[-1] not in (1, 3):
        print(f"{of.recipe.name}: its examples are no images, so there are no grids of them")
        return
    first = np.arange(min(predictions.SHOWN, len(labels)))
    wrong = predictions.most_certain_mistakes(chances, labels)
    grids = {
        "predictions": (first, f"the first {about.split} examples"),
        "mistakes": (wrong, "the most certain mistakes"),
    }
    for name, (which, said) in grids.items():
        if len(which):
            images = about.examples.inputs[which]
            yield name, predictions.grid(images, labels[which], names, chances[which], title=f"{made_by}: {said}")
        else:
            print(f"{of.recipe.name}: no mistake, so there is no grid of them")


def finished(of: Recorded, dataset: Dataset) -> dict[str, np.ndarray]:
    """Return the canonical state of a finished run, verified."""
    return run_reader.read(of.path).state(size_of(dataset))


def _distinct(names: Sequence[str]) -> list[str]:
    """Return names that tell folders apart: the second of one name has a 2 behind it.

    >>> _distinct(["a", "b", "a", "a"])
    ['a', 'b', 'a-2', 'a-3']
    """
    found: list[str] = []
    for name in names:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        found.append(next(one for one in itertools.chain([name], numbered) if one not in found))
    return found


def _labels(recorded: Sequence[Recorded]) -> list[str]:
    """Return what tells each run from the others: recipe, framework and seed, or else its folder."""
    labels = [f"{of.recipe.name}, {of.framework}, seed {of.recipe.seed}" for of in recorded]
    if len(set(labels)) == len(labels):
        return labels
    return [f"{label} ({of.path})" for label, of in zip(labels, recorded, strict=True)]
