"""Find, verify, cache and parse every data set a recipe can name, into NumPy arrays."""

from __future__ import annotations

from pathlib import Path

from spec.datasets import cache, sources, tables
from spec.datasets.catalog import IDX_SETS, IdxSet
from spec.datasets.dataset import Dataset, Split, preprocess
from spec.datasets.tables import from_map_style
from spec.errors import DataError
from spec.recipe import Data, DataSource

__all__ = ["Dataset", "Split", "from_map_style", "load", "preprocess"]

_TABLES = {
    "digits": tables.load_digits,
    "breast_cancer": tables.load_breast_cancer,
    "csv": tables.load_csv,
    "map_style": tables.load_map_style,
    "synthetic": tables.load_synthetic,
}


def load(data: Data, *, data_dir: Path | None = None, data_source: DataSource = "idx") -> Dataset:
    """Return the data set that `data` names, raw: idx images uint8 [n, 28, 28, 1], tables float64 [n, features].

    `data_dir` is a directory with idx files; `data_source` "tfds" reads the same examples through TFDS, in the same
    order. Raises DataError naming the file and the mend.
    """
    idx_set = IDX_SETS.get(data.name)
    if idx_set is None:
        _refuse_for_tables(data.name, data_dir, data_source)
        return _TABLES[data.name](data)
    sources.ensure(idx_set, data_dir=data_dir)
    dataset = _load_idx(idx_set)
    if data_source == "tfds":
        from spec.datasets import tfds_source

        return tfds_source.load(idx_set, dataset)
    return dataset


def _refuse_for_tables(name: str, data_dir: Path | None, data_source: DataSource) -> None:
    if data_dir is not None:
        raise DataError(
            f"--data-dir {data_dir} is for fashion_mnist and mnist; {name} reads no idx files; leave it out"
        )
    if data_source != "idx":
        raise DataError(f"--data-source {data_source} is for fashion_mnist and mnist; {name} has none; leave it out")


def _load_idx(idx_set: IdxSet) -> Dataset:
    arrays = []
    for file in idx_set.files:
        try:
            arrays.append(file.parse(cache.read_cached(idx_set, file), source=file.name))
        except DataError as error:
            raise DataError(f"{error}; {cache.mend(idx_set)}") from None
    train_images, train_labels, test_images, test_labels = arrays
    return Dataset(
        name=idx_set.name,
        train=Split(train_images[..., None], train_labels.astype("int32")),
        test=Split(test_images[..., None], test_labels.astype("int32")),
        class_names=idx_set.class_names,
    )
