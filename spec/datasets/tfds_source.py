"""The same data sets through TensorFlow Datasets, without TensorFlow and without its download.

TFDS's own download of these two sets needs TensorFlow. Here a subclass of its official builder is fed from the verified
cache with PNG bytes, written once as array_record files, and read by the official data source. TFDS stores examples in
the order of the hashes of their keys; `canonical_positions` gives the way back to the order of the idx files.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from spec.datasets import cache
from spec.datasets.catalog import IdxSet
from spec.datasets.dataset import Dataset, Split
from spec.errors import DataError, python_command


def load(idx_set: IdxSet, dataset: Dataset) -> Dataset:
    """Return `dataset` as TFDS gives it, mapped back to canonical order; built from `dataset` the first time.

    Raises DataError when the extra `tfds` is not installed, or when what TFDS stores is not the data set.
    """
    _import_tfds()
    try:
        builder = _prepare(idx_set, dataset)
        splits = {name: _read(builder, name) for name in ("train", "test")}
    except DataError:
        raise
    except Exception as error:  # TFDS and its readers raise what they like on a damaged file or a full disk
        raise DataError(f"TFDS's files of {idx_set.title}: {type(error).__name__}: {error}; {_mend(idx_set)}") from None
    for name, expected in (("train", dataset.train), ("test", dataset.test)):
        if not all(np.array_equal(ours, theirs) for ours, theirs in zip(splits[name], expected, strict=True)):
            raise DataError(
                f"TFDS's {idx_set.title} {name} is not the idx files', example by example; {_mend(idx_set)}"
            )
    return replace(dataset, **splits)


def canonical_positions(split: str, num_examples: int) -> np.ndarray:
    """Return, for each example in the idx files' order, its position in TFDS's split: int64 [num_examples].

    TFDS sorts a split by the salted hash of each key; the key is the example's index, the salt the split's name.
    """
    from tensorflow_datasets.core import hashing

    hasher = hashing.Hasher(split)
    stored = sorted(range(num_examples), key=lambda index: hasher.hash_key(index))
    return np.argsort(np.asarray(stored))


def _prepare(idx_set: IdxSet, dataset: Dataset) -> Any:
    tfds = _import_tfds()
    from tensorflow_datasets.image_classification import mnist

    official = {"fashion_mnist": mnist.FashionMNIST, "mnist": mnist.MNIST}[idx_set.name]
    folder = cache.root() / "tfds"
    with cache.lock(idx_set):
        folder.mkdir(parents=True, exist_ok=True)
        builder = _builder_class(tfds, official, dataset)(data_dir=str(folder), file_format="array_record")
        if not Path(builder.data_path).is_dir():
            print(f"writing {idx_set.title} in TFDS's format, once ...", file=sys.stderr)
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare()
    return builder


def _builder_class(tfds: Any, official: type, dataset: Dataset) -> type:
    class FromCache(official, skip_registration=True):
        name = official.name

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {"train": self._examples(dataset.train), "test": self._examples(dataset.test)}

        @staticmethod
        def _examples(split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, (image, label) in enumerate(zip(split.inputs, split.labels, strict=True)):
                yield index, {"image": io.BytesIO(_png(image[..., 0])), "label": int(label)}

    return FromCache


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _mend(idx_set: IdxSet) -> str:
    return f"delete {cache.root() / 'tfds' / idx_set.name}, and the next run writes them anew"


def _read(builder: Any, name: str) -> Split:
    source = builder.as_data_source(split=name)
    positions = canonical_positions(name, len(source))
    examples = source.__getitems__(positions.tolist())
    return Split(
        np.stack([example["image"] for example in examples]),
        np.asarray([example["label"] for example in examples], np.int32),
    )


def _import_tfds() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import array_record  # noqa: F401
            import importlib_resources  # noqa: F401
            import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"--data-source tfds needs the extra tfds ({error}); in the checkout: {python_command()} "
            "-m pip install -c constraints/main.txt -e '.[tfds]'"
        ) from None
    tfds.disable_progress_bar()
    logging.getLogger("absl").setLevel(logging.ERROR)
    return tfds
