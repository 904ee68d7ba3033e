"""A run's figures as TensorBoard shows them: one event file in `tensorboard/`, made of what `metrics.jsonl` holds.

It is written by tensorboardX's writer of records, at once and in this thread: its `SummaryWriter` hands events to
another thread, where a full disk is no error of the run, and in the end holds it up for ever.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spec.datasets import Dataset
from spec.recipe import Recipe, to_mapping

if TYPE_CHECKING:
    from tensorboardX.proto.summary_pb2 import Summary

SCALARS = {  # by the event of `metrics.jsonl`: its names, and those on the charts
    "epoch": {
        "train_loss": "train_loss",
        "test_loss": "val_loss",
        "train_accuracy": "train_accuracy",
        "test_accuracy": "val_accuracy",
    },
    "progress": {name: name for name in ("batch_loss", "running_loss", "cumulative_train_accuracy")},
}
CHARTS = {"loss": ["train_loss", "val_loss"], "accuracy": ["train_accuracy", "val_accuracy"]}
LEFT_OUT = ("description", "expected", "metrics")  # of a recipe: no hyper-parameters
MOST_IMAGES = 16
IMAGE_CHANNELS = (1, 3)  # grey, RGB


class TensorBoard:
    """Writes the events of one run into a new file in `folder`, which it makes; raises OSError when the disk refuses.

    The file begins with the charts' layout, the hyper-parameters and the first images; `metrics` are the lines of
    `metrics.jsonl` that are there already.
    """

    def __init__(self, folder: Path, recipe: Recipe, dataset: Dataset, metrics: bytes = b"") -> None:
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
        try:
            self._begin(recipe, dataset)
            for line in metrics.splitlines():
                figures = json.loads(line)
                self._scalars(figures["event"], figures)
            self._records.flush()
        except BaseException:
            with contextlib.suppress(OSError):
                self.close()
            raise

    def add(self, event: str, figures: Mapping[str, Any]) -> None:
        """Write the figures of a line of `metrics.jsonl` by the step they belong to, none for what is None; flush."""
        self._scalars(event, figures)
        self._records.flush()

    def finish(self) -> None:
        """Write that the run is finished."""
        self._write(summary=self._end)
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _begin(self, recipe: Recipe, dataset: Dataset) -> None:
        """Write what is there before the first step; a viewer that is open forgets what it has of an earlier part."""
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import SessionLog

        self._write(file_version="brain.Event:2")
        self._write(session_log=SessionLog(status=SessionLog.START))
        outcome = dict.fromkeys(tag for tags in CHARTS.values() for tag in tags)
        *hyper, self._end = summary.hparams(hyper_parameters(recipe), outcome)
        layout = {recipe.name: {chart: ["Multiline", tags] for chart, tags in CHARTS.items()}}
        for one in (*hyper, summary.custom_scalars(layout), *_images(dataset)):
            self._write(summary=one)

    def _scalars(self, event: str, figures: Mapping[str, Any]) -> None:
        from tensorboardX import summary

        for name, tag in SCALARS[event].items():
            if figures[name] is not None:
                self._write(summary=summary.scalar(tag, figures[name]), step=figures["step"])

    def _write(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())


def hyper_parameters(recipe: Recipe) -> dict[str, str | bool | float]:
    """Return the recipe's fields by their paths, lists as text: `optimizer.learning_rate`."""
    return dict(_flat({name: value for name, value in to_mapping(recipe).items() if name not in LEFT_OUT}))


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | bool | float]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else value


def pictures(dataset: Dataset) -> dict[str, np.ndarray]:
    """Return the first training images by number and class, uint8 [height, width, channels]; none of other data.

    Values that are no bytes are spread from their least to their largest.
    """
    inputs, labels = (array[:MOST_IMAGES] for array in dataset.train)
    if inputs.ndim != 4 or inputs.shape[-1] not in IMAGE_CHANNELS:
        return {}
    if inputs.dtype != np.uint8:
        least, largest = inputs.min(), inputs.max()
        inputs = np.round((inputs - least) * (255 / ((largest - least) or 1))).astype(np.uint8)
    names = [dataset.class_names[label] for label in labels]
    return {f"train/{index:02} {name}": image for index, (name, image) in enumerate(zip(names, inputs, strict=True))}


def _images(dataset: Dataset) -> Iterator[Summary]:
    from tensorboardX import summary

    for tag, image in pictures(dataset).items():
        yield summary.image(tag, image, dataformats="HWC")
