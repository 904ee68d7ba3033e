"""What is known of the two idx data sets: files, sizes, content hashes, classes, places to get them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spec.datasets import idx
from spec.errors import DataError

NUM_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class IdxFile:
    """One idx file: its name without `.gz`, the shape of its array, and the sha256 of its decompressed content."""

    name: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def num_bytes(self) -> int:
        """Return the length of the decompressed file."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)

    def parse(self, content: bytes, *, source: str) -> np.ndarray:
        """Return the array in `content`, uint8; DataError unless it has this file's shape, and labels under 10."""
        array = idx.parse(content, rank=len(self.shape), source=source)
        if array.shape != self.shape:
            raise DataError(f"{source} holds shape {list(array.shape)}; {self.name} has {list(self.shape)}")
        if array.ndim == 1 and array.max() >= NUM_CLASSES:
            raise DataError(f"{source} holds the label {array.max()}; labels run from 0 to {NUM_CLASSES - 1}")
        return array


@dataclass(frozen=True, kw_only=True)
class IdxSet:
    """One data set: its folder in torchvision's layout, Debian's package if there is one, mirrors, files, classes."""

    name: str
    title: str
    folder: str
    debian_package: str | None
    mirrors: tuple[str, ...]
    files: tuple[IdxFile, ...]
    class_names: tuple[str, ...]


def _files(train_images: str, train_labels: str, test_images: str, test_labels: str) -> tuple[IdxFile, ...]:
    return (
        IdxFile(name="train-images-idx3-ubyte", shape=(60_000, 28, 28), sha256=train_images),
        IdxFile(name="train-labels-idx1-ubyte", shape=(60_000,), sha256=train_labels),
        IdxFile(name="t10k-images-idx3-ubyte", shape=(10_000, 28, 28), sha256=test_images),
        IdxFile(name="t10k-labels-idx1-ubyte", shape=(10_000,), sha256=test_labels),
    )


IDX_SETS = {
    "fashion_mnist": IdxSet(
        name="fashion_mnist",
        title="Fashion-MNIST",
        folder="FashionMNIST",
        debian_package="dataset-fashion-mnist",
        mirrors=(
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
        ),
        files=_files(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        class_names=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
    "mnist": IdxSet(
        name="mnist",
        title="MNIST",
        folder="MNIST",
        debian_package=None,
        mirrors=(
            "https://storage.googleapis.com/cvdf-datasets/mnist",
            "https://ossci-datasets.s3.amazonaws.com/mnist",
        ),
        files=_files(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        class_names=tuple(str(digit) for digit in range(NUM_CLASSES)),
    ),
}
