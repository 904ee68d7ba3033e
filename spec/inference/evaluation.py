"""The evaluation of a finished run: flags in, figures by class out; the same for both implementations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from spec.command_line import parsed
from spec.datasets import Dataset
from spec.datasets.sizes import size_of
from spec.errors import DataError
from spec.files import check_target, write_atomic
from spec.recipe import DataSource, Recipe
from spec.run import run_reader
from spec.run.run_reader import Run
from spec.run.trainer import Implementation
from spec.table import print_table


class Rounding(NamedTuple):
    """How far the figures of the same weights may be apart on another framework or device: the mean loss, as a share of
    itself, and the share of the answers that turn."""

    loss: float
    answers: float


ROUNDING = {"float64": Rounding(1e-9, 0), "float32": Rounding(1e-5, 1e-4), "bfloat16": Rounding(1e-2, 1e-2)}

Evaluate = Callable[[Recipe, Dataset, Mapping[str, np.ndarray], Any], tuple[np.ndarray, np.ndarray]]
"""An implementation's part: of recipe, data set, canonical state and device, the loss [n] in nats and the predicted
class [n] of each example of the test split."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """One evaluation."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """the run's directory"""
    split: Literal["test", "train"] = "test"
    """which split"""
    json: Path | None = None
    """write the figures to this file too"""
    data_dir: Path | None = None
    """a directory that holds the idx files"""
    data_source: DataSource = "idx"
    """read the idx files, or the same examples through TFDS"""
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    """where to run; an accelerator if there is one, unless given"""


def parse(arguments: Sequence[str], *, program: str, description: str) -> tuple[Flags, Run]:
    """Return the flags and the run that they name, read and verified; exit with 2 on a mistake in the flags.

    Raises UserError for a run that cannot be used or a file that cannot be written.
    """
    flags = parsed(Flags, arguments, prog=program, description=description)
    paths = {name: path.expanduser() for name in ("json", "data_dir") if (path := getattr(flags, name))}
    flags = replace(flags, **paths)
    if flags.json:
        check_target(flags.json, flag="--json")
    return flags, run_reader.read(flags.run)


def run(flags: Flags, of: Run, implementation: Implementation, evaluate: Evaluate) -> dict[str, Any]:
    """Evaluate the run as the flags say, print the figures, write them to a file if asked to; return them.

    Raises SystemExit, with status 1, in the end if they are not the run's own.
    """
    device = implementation.select_device(flags.platform)
    dataset = implementation.load(of.recipe.data, data_dir=flags.data_dir, data_source=flags.data_source)
    state = of.state(size_of(dataset))
    if flags.split == "train":
        dataset = replace(dataset, test=dataset.train)
    if dataset.test is None:
        raise DataError(f"{of.recipe.name} holds no example out (data.test_fraction is 0); add --split train")
    with implementation.memory_explained():
        losses, predictions = evaluate(of.recipe, dataset, state, device)
    report = {"run": str(of.path), "recipe": of.recipe.name, "made_by": of.made_by, "split": flags.split}
    report |= {"framework": implementation.framework, "device": implementation.describe_devices(device)[0]}
    report |= figures(losses, predictions, dataset.test.labels, dataset.class_names)
    report |= comparison(report, of.summary, ROUNDING[of.recipe.precision])
    show(report)
    if flags.json:
        write_atomic(flags.json, (json.dumps(report, indent=2) + "\n").encode())
    if report["equal"] == "no":
        raise SystemExit(1)
    return report


def figures(
    losses: np.ndarray, predictions: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """Return mean loss in nats, accuracy, and the examples and right answers of each class; arrays [n].

    >>> figures(np.array([0.5, 1.5]), np.array([0, 0]), np.array([0, 1]), ("a", "b"))["classes"][1]
    {'name': 'b', 'examples': 1, 'right': 0, 'accuracy': 0.0}
    """
    correct = predictions == labels
    classes = []
    for index, name in enumerate(class_names):
        examples, right = int((labels == index).sum()), int(correct[labels == index].sum())
        accuracy = right / examples if examples else None
        classes.append({"name": name, "examples": examples, "right": right, "accuracy": accuracy})
    return {
        "examples": len(labels),
        "loss": float(losses.mean(dtype=np.float64)),
        "accuracy": float(correct.mean(dtype=np.float64)),
        "classes": classes,
    }


def comparison(report: Mapping[str, Any], summary: Mapping[str, Any] | None, rounding: Rounding) -> dict[str, Any]:
    """Return the run's own test figures, and whether the report's are equal: "bit for bit", "but for rounding" or "no".

    Both are None where there is nothing to compare: another split, or weights that came from a file.
    """
    own = {name: (summary or {}).get(f"test_{name}") for name in ("loss", "accuracy")}
    if report["split"] != "test" or not all(isinstance(value, float | int) for value in own.values()):
        return {"summary": None, "equal": None}
    turned = round(abs(report["accuracy"] - own["accuracy"]) * report["examples"])
    if all(report[name] == value for name, value in own.items()):
        equal = "bit for bit"
    elif abs(report["loss"] - own["loss"]) <= rounding.loss * abs(own["loss"]) and (
        turned <= rounding.answers * report["examples"]
    ):
        equal = "but for rounding"
    else:
        equal = "no"
    return {"summary": own, "equal": equal}


def show(report: Mapping[str, Any]) -> None:
    """Print the figures, whether they are the run's own, and a table of the classes."""
    made_by = f", trained by {report['made_by']}" if report["made_by"] else ""
    print(f"{report['run']}: {report['recipe']}{made_by}; evaluated by {report['framework']} on {report['device']}")
    print(
        f"{report['split']} split, {report['examples']:,} examples: loss {report['loss']:.4f}, "
        f"accuracy {report['accuracy']:.4f}"
    )
    print(_compared(report))
    rows = [
        (row["name"], f"{row['examples']:,}", f"{row['right']:,}", f"{row['accuracy']:.4f}" if row["examples"] else "-")
        for row in report["classes"]
    ]
    headings = ("class", "examples", "right", "accuracy")
    print_table(headings, rows, right=headings[1:])


def _compared(report: Mapping[str, Any]) -> str:
    if report["split"] == "train":
        return "nothing to compare: the training figures of summary.json are the last epoch's, taken while it trained"
    if report["equal"] is None:
        return "nothing to compare: the run has no summary.json with test figures"
    own = report["summary"]
    if report["equal"] == "bit for bit":
        return "equal to the run's own summary.json, bit for bit"
    if report["equal"] == "but for rounding":
        off = {name: f"{report[name] - own[name]:+.1e}" for name in own if report[name] != own[name]}
        said = " and ".join(f"the {name} is {value}" for name, value in off.items())
        return f"equal to the run's own summary.json but for rounding: {said} off"
    return (
        f"NOT equal to the run's own summary.json, which says loss {own['loss']:.4f}, accuracy {own['accuracy']:.4f}: "
        "other data, another device, or other weights"
    )
