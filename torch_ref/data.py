"""The data as torch has it: torchvision's data set class on the shared cache, a DataLoader over the specified order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from spec import datasets
from spec.batches import Counts
from spec.datasets import Dataset, Split, cache, sources
from spec.datasets.catalog import IDX_SETS, IdxSet
from spec.errors import DataError
from spec.recipe import Data, DataSource, Preprocessing
from torch_ref.vision import torchvision


def load(data: Data, *, data_dir: Path | None = None, data_source: DataSource = "idx") -> Dataset:
    """Return the data set that `data` names, raw: idx sets through torchvision's class, others as `spec.datasets`.

    torchvision never checks a file it finds, so the cache's contents are verified first. Raises DataError.
    """
    idx_set = IDX_SETS.get(data.name)
    if idx_set is None or data_source != "idx":
        return datasets.load(data, data_dir=data_dir, data_source=data_source)
    sources.ensure(idx_set, data_dir=data_dir)
    if damage := cache.damage(idx_set):
        raise DataError(f"{next(iter(damage.values()))}; {cache.mend(idx_set)}")
    train, test = (_read(idx_set, train=train) for train in (True, False))
    return Dataset(name=data.name, train=train, test=test, class_names=idx_set.class_names)


def _read(idx_set: IdxSet, *, train: bool) -> Split:
    read = getattr(torchvision.datasets, idx_set.folder)(cache.root(), train=train, download=False)
    return Split(read.data.numpy()[..., None], read.targets.numpy().astype(np.int32))


def preprocess(dataset: Dataset, preprocessing: Preprocessing, *, dtype: torch.dtype) -> list[TensorDataset]:
    """Return the training split, and the test split if there is one, as (inputs, labels int64) of `dtype`.

    Inputs are normalised in float32 as torchvision's ToTensor and Normalize do (S1), images [n, channels, height,
    width]. Columns are standardised by `spec.datasets`, which is what both sides share.
    """
    if preprocessing.standardize:
        dataset = datasets.preprocess(dataset, preprocessing)
    return [_tensors(split, preprocessing, dtype) for split in (dataset.train, dataset.test) if split]


def _tensors(split: Split, preprocessing: Preprocessing, dtype: torch.dtype) -> TensorDataset:
    inputs = torch.tensor(split.inputs).float()
    if not preprocessing.standardize:
        inputs = inputs.div(preprocessing.divisor).sub(preprocessing.mean).div(preprocessing.std)
    if not inputs.isfinite().all():
        raise DataError("the inputs have values that overflow float32 after preprocessing; scale them down")
    return TensorDataset(channels_first(inputs).to(dtype), torch.tensor(split.labels).long())


def channels_first(inputs: torch.Tensor) -> torch.Tensor:
    """Return images [n, h, w, c] as [n, c, h, w], laid out as torchvision's are; other inputs as they are.

    `contiguous()` would leave images of one channel with the strides of channels last, which are as contiguous. A
    convolution then answers channels last, and on CPU BatchNorm adds such values up one after another in float32: a
    variance is 2e-4 off, where it is 1e-7 otherwise.
    """
    if inputs.ndim != 4:
        return inputs
    return inputs.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


def batches(
    examples: TensorDataset, counts: Counts, order: np.ndarray, *, start: int = 0, stop: int | None = None
) -> DataLoader:
    """Return the DataLoader of the steps [start, stop) of an epoch, all unless given: batch i holds the examples
    order[i B : (i+1) B], the last one may be short."""
    index = torch.from_numpy(order)[: counts.examples_per_epoch].split(counts.batch_size)
    return DataLoader(examples, sampler=index[start:stop], batch_size=None)
