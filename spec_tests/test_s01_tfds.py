"""S1: TFDS gives the same examples in the same order as the idx files, and its own order is another one."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from spec import datasets
from spec.datasets import Split, cache, tfds_source
from spec.datasets.catalog import IDX_SETS
from spec.errors import DataError
from spec.recipe import Data
from spec_tests.conftest import ARRAYS, CONTENTS

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # inside TFDS and what it imports


@pytest.fixture
def tiny_loaded(tiny):
    cache.raw_folder(tiny).mkdir(parents=True)
    cache.store(tiny, CONTENTS)
    return tiny, datasets.load(Data(name="fashion_mnist"), data_source="tfds")


def test_tfds_gives_the_idx_files_examples_in_their_order(tiny_loaded):
    _, loaded = tiny_loaded
    assert np.array_equal(loaded.train.inputs[..., 0], ARRAYS["train-images-idx3-ubyte"])
    assert np.array_equal(loaded.train.labels, ARRAYS["train-labels-idx1-ubyte"])
    assert np.array_equal(loaded.test.inputs[..., 0], ARRAYS["t10k-images-idx3-ubyte"])
    assert "tensorflow" not in sys.modules


def test_the_stored_order_is_that_of_the_hashed_keys(tiny_loaded):
    tiny, loaded = tiny_loaded
    stored = tfds_source._prepare(tiny, loaded).as_data_source(split="train")
    labels = [int(example["label"]) for example in stored]
    positions = tfds_source.canonical_positions("train", 6)
    assert labels != ARRAYS["train-labels-idx1-ubyte"].tolist()
    assert [labels[position] for position in positions] == ARRAYS["train-labels-idx1-ubyte"].tolist()


def test_files_that_are_not_the_data_set_are_refused(tiny_loaded):
    tiny, loaded = tiny_loaded
    other = Split(loaded.train.inputs, loaded.train.labels[::-1])
    with pytest.raises(DataError, match="is not the idx files', example by example; delete "):
        tfds_source.load(tiny, dataclasses.replace(loaded, train=other))


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no description"])
def test_damaged_tfds_files_are_refused_with_the_folder_to_delete(tiny_loaded, damage):
    tiny, loaded = tiny_loaded
    folder = cache.root() / "tfds" / "fashion_mnist"
    (records,) = folder.rglob("*train*array_record*")
    content = records.read_bytes()
    match damage:
        case "cut":
            records.write_bytes(content[: len(content) // 2])
        case "flipped":
            position = content.index(b"IHDR") + 6
            records.write_bytes(content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :])
        case "missing":
            records.unlink()
        case "no description":
            next(folder.rglob("dataset_info.json")).write_text("{")
    with pytest.raises(DataError, match=rf"delete {folder}, and the next run writes them anew"):
        tfds_source.load(tiny, loaded)


def test_the_first_train_label_that_tfds_stores_is_2_where_the_idx_files_is_9(fashion_mnist):
    first = int(np.flatnonzero(tfds_source.canonical_positions("train", 60_000) == 0)[0])
    assert fashion_mnist.train.labels[first] == 2
    assert fashion_mnist.train.labels[0] == 9


@pytest.mark.slow(minutes=1)
def test_all_of_fashion_mnist_comes_through_tfds_unchanged(fashion_mnist):
    loaded = tfds_source.load(IDX_SETS["fashion_mnist"], fashion_mnist)
    for mine, theirs in ((loaded.train, fashion_mnist.train), (loaded.test, fashion_mnist.test)):
        assert np.array_equal(mine.inputs, theirs.inputs)
        assert np.array_equal(mine.labels, theirs.labels)
