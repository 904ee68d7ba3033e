"""S1: contents are verified, parsed and preprocessed as the clause says; every kind of damage is refused by name."""

from __future__ import annotations

import dataclasses
import gzip
import os
import re
from importlib import resources
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_impl.stepper
import torch_ref.data
from jax_impl.parallel import place
from spec import datasets, recipe
from spec.datasets import Dataset, Split, __main__, cache, idx, preprocess, sources, tables
from spec.datasets.catalog import IDX_SETS, IdxFile, IdxSet
from spec.datasets.sizes import known_size
from spec.errors import DataError, RecipeError
from spec.recipe import Data, Preprocessing
from spec_tests.assertions import assert_identical
from spec_tests.conftest import ARRAYS, CONTENTS, idx_bytes
from spec_tests.tolerances import DEVIATIONS, unit_roundoff
from torch_ref.vision import torchvision


def put(folder: Path, *, compressed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in CONTENTS.items():
        path = folder / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(content) if compressed else content)
    return folder


def load() -> Dataset:
    return datasets.load(Data(name="fashion_mnist"))


# The real files


def test_real_fashion_mnist_has_the_known_first_labels_and_pixel_sums(fashion_mnist):
    assert fashion_mnist.train.inputs.shape == (60_000, 28, 28, 1)
    assert fashion_mnist.test.inputs.shape == (10_000, 28, 28, 1)
    assert fashion_mnist.train.labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert np.bincount(fashion_mnist.train.labels).tolist() == [6_000] * 10
    assert fashion_mnist.train.inputs.dtype == np.uint8


def test_real_mnist_has_the_known_first_labels(mnist):
    assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert mnist.train.inputs.shape == (60_000, 28, 28, 1)


def test_the_hashes_of_the_text_are_those_of_the_catalogue():
    text = (resources.files("spec") / "SPEC.md").read_text("utf-8")
    row = r"^\| (.+), (train|test) (images|labels) \| `([0-9a-f]{64})` \|$"
    stated = {(title, split, kind): sha256 for title, split, kind, sha256 in re.findall(row, text, re.MULTILINE)}
    kept = {
        (idx_set.title, "train" if file.name.startswith("train") else "test", file.name.split("-")[1]): file.sha256
        for idx_set in IDX_SETS.values()
        for file in idx_set.files
    }
    assert len(kept) == 8
    assert stated == kept


# The cache and the sources


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("below", [".", "raw", "FashionMNIST/raw"])
def test_a_named_directory_fills_the_cache_in_torchvisions_layout(tiny, tmp_path, compressed, below):
    named = tmp_path / "named"
    put(named / below, compressed=compressed)
    loaded = datasets.load(Data(name="fashion_mnist"), data_dir=named)
    assert np.array_equal(loaded.train.inputs[..., 0], ARRAYS["train-images-idx3-ubyte"])
    assert np.array_equal(loaded.test.labels, ARRAYS["t10k-labels-idx1-ubyte"])
    raw = tmp_path / "cache" / "FashionMNIST" / "raw"
    assert {path.name: path.read_bytes() for path in raw.iterdir() if path.name != ".lock"} == CONTENTS


def test_the_cache_comes_before_every_other_source(tiny, monkeypatch):
    put(cache.raw_folder(tiny))
    monkeypatch.setattr(sources, "sources", lambda: pytest.fail("a source was asked although the cache has the files"))
    assert load().train.labels.tolist() == [0, 1, 2, 3, 4, 9]


def test_the_systems_package_is_read_where_debian_puts_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SYSTEM_FOLDER", tmp_path / "share")
    put(tmp_path / "share" / "fashion-mnist", compressed=True)
    found = sources.from_system_package(
        dataclasses.replace(tiny, debian_package="dataset-fashion-mnist"), list(tiny.files)
    )
    assert found == CONTENTS


def test_sources_are_tried_in_order_until_one_works(tiny, monkeypatch):
    asked = []

    def source(name: str, works: bool):
        def ask(_set: IdxSet, files: list[IdxFile]) -> dict[str, bytes]:
            asked.append(name)
            if not works:
                raise DataError(f"{name} has nothing")
            return {file.name: CONTENTS[file.name] for file in files}

        return ask

    monkeypatch.setattr(
        sources, "sources", lambda: {"a": source("a", False), "b": source("b", True), "c": source("c", True)}
    )
    assert load().num_classes == 10
    assert asked == ["a", "b"]
    assert list(sources.sources()) == ["a", "b", "c"]


def test_the_order_of_the_sources_is_package_mirrors_apt():
    assert list(sources.sources()) == ["the system's package", "https mirrors", "apt-get download"]


def test_with_no_source_the_error_lists_every_way(tiny):
    with pytest.raises(DataError) as caught:
        load()
    for way in ("the system's package:", "https mirrors:", "apt-get download:", "--data-dir DIR", "--recipe digits"):
        assert way in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 10


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(tiny, tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    monkeypatch.setenv("LOCKSTEP_CACHE", str(blocker))
    with pytest.raises(DataError, match=r"cache .*file.* cannot be written.*LOCKSTEP_CACHE"):
        datasets.load(Data(name="fashion_mnist"), data_dir=put(tmp_path / "named"))


@pytest.mark.parametrize("name", ["n" * 300, "\0"])
def test_a_path_that_cannot_be_reached_is_an_error_like_any_other(tiny, tmp_path, monkeypatch, name):
    with pytest.raises(DataError):
        datasets.load(Data(name="fashion_mnist"), data_dir=tmp_path / name)
    with pytest.raises(DataError):
        datasets.load(Data(name="csv", path=str(tmp_path / name), test_fraction=0.0, seed=0))
    with pytest.raises(RecipeError):
        recipe.load(str(tmp_path / f"{name}.toml"))
    if name != "\0":
        monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / name))
        with pytest.raises(DataError, match="cannot be written"):
            datasets.load(Data(name="fashion_mnist"), data_dir=put(tmp_path / "named"))


# Damage


def flipped(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


DAMAGE = {
    "empty": (lambda content: b"", "is empty"),
    "cut short": (lambda content: content[:-10], "is cut short: it holds 4,710 of 4,720 bytes"),
    "only a header": (lambda content: content[:16], "is cut short"),
    "one bit flipped": (flipped, "is damaged: its sha256 is"),
    "trailing bytes": (lambda content: content + b"\0", "holds over 4,720 bytes"),
    "mislabelled": (
        lambda content: CONTENTS["t10k-images-idx3-ubyte"],
        "is mislabelled: it holds Fashion-MNIST's t10k-images-idx3-ubyte, not train-images-idx3-ubyte",
    ),
    "gzip cut short": (lambda content: gzip.compress(content)[:-20], "cannot be read"),
    "gzip bomb": (lambda content: gzip.compress(bytes(50_000_000)), "holds over 4,720 bytes"),
    "gzip with a wrong checksum": (lambda content: gzip.compress(content)[:-8] + bytes(8), "cannot be read"),
    "another format": (lambda content: b"\x89PNG" + content[4:], "is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_in_the_cache_is_named_with_the_way_to_fetch_it_anew(tiny, kind):
    damage, said = DAMAGE[kind]
    path = put(cache.raw_folder(tiny)) / "train-images-idx3-ubyte"
    path.write_bytes(damage(CONTENTS[path.name]))
    with pytest.raises(DataError) as caught:
        load()
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert re.search(r"`\S*python\S* -m spec.datasets fetch fashion_mnist` fetches it anew", str(caught.value))


@pytest.mark.parametrize("kind", DAMAGE)
def test_torchvision_reads_no_file_that_was_not_verified(tiny, tmp_path, monkeypatch, kind):
    damage, said = DAMAGE[kind]
    monkeypatch.setattr(torchvision.datasets, tiny.folder, lambda *a, **k: pytest.fail("torchvision was asked to read"))
    path = put(cache.raw_folder(tiny)) / "train-images-idx3-ubyte"
    path.write_bytes(damage(CONTENTS[path.name]))
    with pytest.raises(DataError) as caught:
        torch_ref.data.load(Data(name="fashion_mnist"))
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "fetches it anew" in str(caught.value)
    path.write_bytes(CONTENTS[path.name])
    named = put(tmp_path / "named") / path.name
    named.write_bytes(damage(CONTENTS[path.name]))
    with pytest.raises(DataError, match=re.escape(str(named))):
        torch_ref.data.load(Data(name="fashion_mnist"), data_dir=tmp_path / "named")


def test_torchvisions_class_gives_the_examples_that_the_parser_gives(tiny):
    put(cache.raw_folder(tiny))
    theirs, ours = (side.load(Data(name="fashion_mnist")) for side in (torch_ref.data, datasets))
    assert theirs.class_names == ours.class_names
    for mine, other in ((ours.train, theirs.train), (ours.test, theirs.test)):
        assert_identical(other._asdict(), mine._asdict(), item="torchvision")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_in_a_named_directory_is_refused_even_when_the_cache_is_good(tiny, tmp_path, kind):
    damage, said = DAMAGE[kind]
    put(cache.raw_folder(tiny))
    path = put(tmp_path / "named") / "train-images-idx3-ubyte"
    path.write_bytes(damage(CONTENTS[path.name]))
    with pytest.raises(DataError, match=said.replace("(", r"\(")) as caught:
        datasets.load(Data(name="fashion_mnist"), data_dir=tmp_path / "named")
    assert str(path) in str(caught.value)
    assert not list((tmp_path / "cache").rglob(".*ubyte*"))


def test_a_good_named_directory_mends_a_damaged_cache(tiny, tmp_path):
    path = put(cache.raw_folder(tiny)) / "train-images-idx3-ubyte"
    path.write_bytes(b"")
    assert datasets.load(Data(name="fashion_mnist"), data_dir=put(tmp_path / "named")).num_classes == 10
    assert path.read_bytes() == CONTENTS[path.name]


def test_a_missing_file_or_directory_is_named(tiny, tmp_path):
    with pytest.raises(DataError, match="nowhere is not a directory"):
        datasets.load(Data(name="fashion_mnist"), data_dir=tmp_path / "nowhere")
    (put(tmp_path / "named") / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"named/t10k-labels-idx1-ubyte is missing"):
        datasets.load(Data(name="fashion_mnist"), data_dir=tmp_path / "named")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: os.mkfifo(path)], ids=["directory", "fifo"])
def test_what_is_no_regular_file_is_refused_at_once(tiny, make):
    path = put(cache.raw_folder(tiny)) / "train-labels-idx1-ubyte"
    path.unlink()
    make(path)
    with pytest.raises(DataError, match="is not a regular file"):
        load()


def test_fetch_mends_a_damaged_cache_and_verify_says_which_file_is_bad(tiny, tmp_path, capsys):
    path = put(cache.raw_folder(tiny)) / "train-images-idx3-ubyte"
    path.write_bytes(flipped(CONTENTS[path.name]))
    with pytest.raises(DataError, match=r"1 of 4 files are bad; .* fetches it anew"):
        __main__.verify("fashion_mnist")
    shown = capsys.readouterr().out
    assert shown.count("good  ") == 3
    assert f"bad   {path} is damaged: its sha256 is" in shown
    sources.fetch("fashion_mnist", data_dir=put(tmp_path / "good"))
    assert path.read_bytes() == CONTENTS[path.name]
    __main__.verify("fashion_mnist")
    assert capsys.readouterr().out.count("good") == 4


@given(st.binary(max_size=64))
def test_any_bytes_are_an_array_or_a_data_error(content):
    for rank in (1, 3):
        try:
            array = idx.parse(content, rank=rank, source="bytes")
        except DataError:
            continue
        assert idx_bytes(array) == content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0\0\x08", "has 3 bytes"),
        (b"\0\0\x0d\x01\0\0\0\x01\0", "starts with 00 00 0d 01"),
        (b"\0\0\x08\x03\0\0\0\x01\0", "starts with 00 00 08 03"),
        (b"\0\0\x08\x01\xff\xff\xff\xff\0", "its header says 4,294,967,303"),
        (b"\0\0\x08\x01\0\0\0\x02\0", "has 9 bytes; its header says 10"),
    ],
)
def test_a_wrong_header_is_refused_with_what_it_should_be(content, said):
    with pytest.raises(DataError, match=said):
        idx.parse(content, rank=1, source="labels")


def test_a_label_of_ten_or_more_is_refused_even_with_a_right_length():
    file = IdxFile(name="labels", shape=(2,), sha256="")
    with pytest.raises(DataError, match="holds the label 255; labels run from 0 to 9"):
        file.parse(idx_bytes(np.array([3, 255], np.uint8)), source="labels")


# Preprocessing

UNIT = Preprocessing(divisor=255.0, mean=0.0, std=1.0, standardize=False)


def levels() -> Dataset:
    inputs = np.arange(256, dtype=np.uint8).reshape(256, 1)
    labels = np.arange(256, dtype=np.int32) % 2
    return Dataset(name="levels", train=Split(inputs, labels), test=None, class_names=("a", "b"))


def test_all_256_levels_are_divided_in_float32_not_multiplied_by_the_reciprocal():
    unit = preprocess(levels(), UNIT).train.inputs[:, 0]
    expected = np.array([np.float32(level) / np.float32(255) for level in range(256)])
    assert unit.dtype == np.float32
    assert np.array_equal(unit, expected)
    reciprocal = np.arange(256, dtype=np.float32) * (np.float32(1) / np.float32(255))
    assert np.count_nonzero(unit != reciprocal) > 100


def test_the_mean_is_subtracted_before_the_division_by_std():
    half = preprocess(levels(), dataclasses.replace(UNIT, mean=0.5, std=0.25)).train.inputs[:, 0]
    assert half[0] == -2
    assert half[255] == 2
    assert half[51] == (np.float32(51) / np.float32(255) - np.float32(0.5)) / np.float32(0.25)


@pytest.mark.parametrize("asked", [UNIT, dataclasses.replace(UNIT, mean=0.1307, std=0.3081)], ids=["unit", "normal"])
def test_bytes_on_the_device_have_the_hosts_values_in_a_compiled_program(asked):
    dataset = levels()
    split, _ = jax_impl.stepper.put(dataset, asked, place("cpu"))
    assert split.inputs.dtype == np.uint8
    found = jax.jit(lambda split: split.images(split.inputs))(split)
    wanted = preprocess(dataset, asked).train.inputs
    assert_identical({"inputs": np.array(found)}, {"inputs": wanted}, item="jax")


def test_inputs_that_are_not_bytes_or_are_standardised_go_to_the_device_as_float32():
    for dataset, asked in (
        (dataclasses.replace(levels(), train=Split(levels().train.inputs.astype(float), levels().train.labels)), UNIT),
        (levels(), dataclasses.replace(UNIT, standardize=True)),
    ):
        split, _ = jax_impl.stepper.put(dataset, asked, place("cpu"))
        assert split.table is None
        wanted = preprocess(dataset, asked).train.inputs
        assert_identical({"inputs": np.array(split.images(split.inputs))}, {"inputs": wanted}, item="jax")


def test_standardising_uses_the_training_split_alone_and_centres_a_constant_column():
    train = Split(np.array([[1.0, 7.0], [3.0, 7.0]]), np.array([0, 1], np.int32))
    test = Split(np.array([[5.0, 8.0]]), np.array([1], np.int32))
    dataset = Dataset(name="table", train=train, test=test, class_names=("a", "b"))
    raw = Preprocessing(divisor=1.0, mean=0.0, std=1.0, standardize=True)
    done = preprocess(dataset, raw)
    assert done.train.inputs.tolist() == [[-1, 0], [1, 0]]  # mean 2, population deviation 1
    assert done.test.inputs.tolist() == [[3, 1]]


def test_standardising_keeps_the_differences_of_a_column_with_a_large_offset():
    times = Split(1.7e9 + np.arange(4.0)[:, None], np.array([0, 1, 0, 1], np.int32))
    dataset = Dataset(name="times", train=times, test=None, class_names=("a", "b"))
    done = preprocess(dataset, Preprocessing(divisor=1.0, mean=0.0, std=1.0, standardize=True))
    expected = (np.arange(4) - 1.5) / np.sqrt(1.25)
    # Rounded to float32 once, at the end; what float64 loses before is far less.
    assert np.abs(done.train.inputs[:, 0] - expected).max() <= unit_roundoff(np.float32) * np.abs(expected).max()


def test_values_that_overflow_float32_are_refused():
    dataset = levels()
    huge = dataclasses.replace(dataset, train=Split(np.full((2, 1), 1e300), dataset.train.labels[:2]))
    with pytest.raises(DataError, match="overflow float32"):
        preprocess(huge, UNIT)
    with pytest.raises(DataError, match="overflow float32"):
        torch_ref.data.preprocess(huge, UNIT, dtype=torch.float64)


def pictures(seed: int, dtype: type = np.uint8) -> Dataset:
    """Return images of unequal dimensions; class 2 is in neither split."""
    generator = np.random.default_rng(seed)
    inputs = generator.integers(0, 256, (7, 5, 4, 3)).astype(dtype)
    labels = generator.integers(0, 2, 7).astype(np.int32)
    splits = {"train": Split(inputs[:4], labels[:4]), "test": Split(inputs[4:], labels[4:])}
    return Dataset(name="pictures", class_names=("a", "b", "c"), **splits)


def assert_torch_has(dataset: Dataset, preprocessing: Preprocessing, expected: list[np.ndarray]) -> None:
    """Fail unless torch's splits are `expected` bit for bit, channels first; float64 widens the float32 values."""
    for dtype in (torch.float32, torch.float64):
        splits = torch_ref.data.preprocess(dataset, preprocessing, dtype=dtype)
        for (inputs, labels), raw, wanted in zip(
            (split.tensors for split in splits), (dataset.train, dataset.test), expected, strict=True
        ):
            moved = np.ascontiguousarray(np.moveaxis(wanted, -1, 1)) if wanted.ndim == 4 else wanted
            assert inputs.is_contiguous()
            found = {"inputs": inputs.numpy(), "labels": labels.numpy()}
            widened = moved.astype(found["inputs"].dtype)
            assert_identical(found, {"inputs": widened, "labels": raw.labels.astype(np.int64)}, item=f"torch, {dtype}")
            assert inputs.dtype == dtype


@settings(deadline=None)
@given(
    divisor=st.floats(0.5, 300),
    mean=st.floats(-2, 2),
    std=st.floats(0.1, 3),
    dtype=st.sampled_from([np.uint8, np.float32, np.float64]),
    seed=st.integers(0, 999),
)
def test_torch_and_numpy_normalise_to_the_same_bits(divisor, mean, std, dtype, seed):
    dataset = pictures(seed, dtype)
    asked = Preprocessing(divisor=divisor, mean=mean, std=std, standardize=False)
    a, b, c = map(np.float32, (divisor, mean, std))
    expected = [(raw.inputs.astype(np.float32) / a - b) / c for raw in (dataset.train, dataset.test)]
    ours = preprocess(dataset, asked)
    for found, wanted in zip((ours.train, ours.test), expected, strict=True):
        assert_identical({"inputs": found.inputs}, {"inputs": wanted}, item="NumPy")
    assert_torch_has(dataset, asked, expected)


@settings(deadline=None, max_examples=20)
@given(offset=st.floats(-1e6, 1e6), spread=st.floats(0.1, 10), seed=st.integers(0, 999))
def test_torch_and_numpy_standardise_to_the_same_bits(offset, spread, seed):
    drawn = offset + spread * np.random.default_rng(seed).standard_normal((11, 3))
    labels = np.arange(11, dtype=np.int32) % 2
    dataset = Dataset(
        name="table", train=Split(drawn[:7], labels[:7]), test=Split(drawn[7:], labels[7:]), class_names=("a", "b")
    )
    mean, deviation = drawn[:7].mean(axis=0), drawn[:7].std(axis=0)
    expected = [((part - mean) / deviation).astype(np.float32) for part in (drawn[:7], drawn[7:])]
    asked = dataclasses.replace(UNIT, divisor=1.0, standardize=True)
    assert_identical({"inputs": preprocess(dataset, asked).test.inputs}, {"inputs": expected[1]}, item="NumPy")
    assert_torch_has(dataset, asked, expected)


def test_torchs_images_are_ours_with_the_channels_moved():
    dataset = pictures(0)
    ours = preprocess(dataset, UNIT).train.inputs
    train, _ = torch_ref.data.preprocess(dataset, UNIT, dtype=torch.float32)
    images, labels = train.tensors
    assert images.shape == (4, 3, 5, 4)
    assert labels.dtype == torch.int64
    for example, row, column, channel in np.ndindex(ours.shape):
        assert images[example, channel, row, column] == ours[example, row, column, channel]
    assert torch_ref.data.preprocess(levels(), UNIT, dtype=torch.float32)[0].tensors[0].shape == (256, 1)


# Tables


@pytest.mark.parametrize("name", ["digits", "breast-cancer", "synthetic-3class", "synthetic-50k"])
def test_known_sizes_are_those_of_the_loaded_data(name):
    data = recipe.load(name).data
    loaded, size = datasets.load(data), known_size(data)
    assert len(loaded.train.labels) == size.num_train
    assert (len(loaded.test.labels) if loaded.test else 0) == size.num_test
    assert loaded.input_shape == size.input_shape
    assert loaded.num_classes == size.num_classes


def test_real_sizes_are_the_known_ones(fashion_mnist):
    size = known_size(Data(name="fashion_mnist"))
    assert (size.num_train, size.num_test, size.input_shape, size.num_classes) == (60_000, 10_000, (28, 28, 1), 10)
    assert fashion_mnist.input_shape == size.input_shape


def test_synthetic_values_are_uniform_up_to_high_and_follow_the_seed():
    data = recipe.load("synthetic-50k").data
    inputs = datasets.load(data).train.inputs
    assert inputs.shape == (50_000, 20)
    assert 0 <= inputs.min() < 0.01
    assert 99.99 < inputs.max() < 100
    assert abs(inputs.mean() - 50) < DEVIATIONS * 100 / np.sqrt(12 * inputs.size)
    assert np.array_equal(inputs, datasets.load(data).train.inputs)
    assert not np.array_equal(inputs, datasets.load(dataclasses.replace(data, seed=1)).train.inputs)


def csv_data(tmp_path: Path, text: str | bytes, *, test_fraction: float = 0.0) -> Data:
    path = tmp_path / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Data(name="csv", path=str(path), test_fraction=test_fraction, seed=0)


@pytest.mark.parametrize(
    "text",
    ["a,b,label\n1,2,3\n4,5,7\n", "1,2,3\n4,5,7\n", '"a","b","label"\r\n1,2,"3"\r\n4,5,"7"\r\n', "\ufeff1,2,3\n4,5,7"],
    ids=["header", "no header", "quoted", "byte order mark"],
)
def test_a_csv_gives_its_columns_and_classes_in_the_order_of_the_labels(tmp_path, text):
    loaded = datasets.load(csv_data(tmp_path, text))
    assert loaded.train.inputs.tolist() == [[1, 2], [4, 5]]
    assert loaded.train.labels.tolist() == [0, 1]
    assert loaded.class_names == ("3", "7")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no rows"),
        ("a,b,label\n", "holds no rows"),
        ("1\n0\n1\n", "has one column"),
        (
            "1,2,0\n1,red,1\n",
            "'red' to float64 in data row 2, column 2; every field must be a number, the label too; mend or",
        ),
        ("1,2,0\n1,,1\n", "'' to float64 in data row 2, column 2"),
        ("h,i,j\n1,2,0\n1,2\n", "changed from 3 to 2 in data row 2; mend or drop that row"),
        ("1,2,0\n1,nan,1\n", "has nan in data row 2; every value must be a finite number"),
        ("1,2,0\n1,inf,1\n", "has inf in data row 2"),
        ("1,2,0\n1,2,0.5\n", "has 0.5 in data row 2; the last column must hold whole-number labels"),
        ("1,2,1\n1,2,1\n", "csv has labels from 0 to 0; two classes at least are needed"),
        (b"1,2,0\n\xff\xfe,2,1\n", "cannot be read"),
        (",,\n1,2,0\n3,4,1\n", "'' to float64 in data row 1, column 1"),
    ],
)
def test_a_bad_csv_is_refused_naming_the_file_the_row_and_the_rule(tmp_path, text, said):
    with pytest.raises(DataError, match=said) as caught:
        datasets.load(csv_data(tmp_path, text))
    assert len(str(caught.value).splitlines()) <= 3


def test_a_csv_that_is_not_there_or_not_named_is_refused(tmp_path):
    for path, said in [
        ("", "data.path is empty"),
        (str(tmp_path / "no.csv"), "does not exist"),
        (str(tmp_path), "file"),
    ]:
        with pytest.raises(DataError, match=said):
            datasets.load(Data(name="csv", path=path, test_fraction=0.0, seed=0))


def test_the_held_out_share_is_disjoint_complete_and_drawn_by_the_seed():
    inputs, labels = np.arange(100.0)[:, None], np.arange(100) % 2
    data = Data(name="digits", test_fraction=0.25, seed=3)
    split = tables.held_out("any", inputs, labels, ("a", "b"), data)
    test = np.sort(np.random.default_rng([3, *b"split"]).permutation(100)[:25])
    assert split.test.inputs[:, 0].tolist() == test.tolist()
    assert sorted([*split.train.inputs[:, 0], *split.test.inputs[:, 0]]) == list(range(100))


class Items:
    """A user's map-style data set."""

    def __init__(self, pairs: list) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> object:
        return self.pairs[index]


class Broken(list):
    """A map-style data set whose second file is missing."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> object:
        if index:
            raise FileNotFoundError("one.png")
        return [1], 0


MAP_STYLE = Data(name="map_style", path="spec_tests.conftest:MadeUpImages", test_fraction=0.0, seed=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.int16])
def test_a_map_style_data_set_keeps_its_dtype(dtype):
    items = Items([(np.array([1, 2], dtype), 0), (np.array([3, 4], dtype), 1)])
    loaded = datasets.from_map_style(items, MAP_STYLE)
    assert loaded.train.inputs.dtype == dtype
    assert loaded.train.inputs.tolist() == [[1, 2], [3, 4]]
    assert loaded.class_names == ("0", "1")


def test_a_map_style_data_set_is_found_by_module_and_object():
    loaded = datasets.load(MAP_STYLE)
    assert loaded.train.inputs.shape == (260, 28, 28, 1)
    for path, said in [
        ("nowhere:thing", "ModuleNotFoundError"),
        ("spec_tests.conftest:Nothing", "AttributeError"),
        ("not a path", "ValueError"),
        ("spec_tests.conftest:idx_bytes", "TypeError"),
    ]:
        with pytest.raises(DataError, match=f"'{path}' gives no data set: {said}"):
            datasets.load(dataclasses.replace(MAP_STYLE, path=path))


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], "is empty"),
        ([1, 2], "is not a pair"),
        ([([1], 0), ([1, 2], 1)], "different shapes"),
        ([([1.0], 0), ([float("nan")], 1)], "1 input values that are not finite"),
        ([([1], 0), ([2], -1)], "labels from -1 to 0"),
        (Broken(), "item 1 of the map-style data set raised FileNotFoundError: one.png"),
        ([([1], 0.5), ([2], 1.0)], "one integer each is needed"),
        ([([1], 0), ([2], 0)], "two classes at least"),
        ([(["red"], 0), (["blue"], 1)], "numbers .* are needed"),
        ([([1, [2, 3]], 0), ([1, 2], 1)], "inputs are no arrays"),
        ([([1], 0), ([2], [1, 2])], "labels have different shapes"),
        ([([1], 0), ([2], 10**10)], "labels from 0 to 10000000000"),
        ([(1, 0), (2, 1)], "numbers .* are needed"),
    ],
)
def test_a_bad_map_style_data_set_is_refused(pairs, said):
    with pytest.raises(DataError, match=said):
        datasets.from_map_style(Items(pairs), MAP_STYLE)


def test_flags_for_idx_files_are_refused_for_tables(tmp_path):
    data = recipe.load("digits").data
    with pytest.raises(DataError, match=r"--data-dir .* is for fashion_mnist and mnist"):
        datasets.load(data, data_dir=tmp_path)
    with pytest.raises(DataError, match="--data-source tfds is for fashion_mnist and mnist"):
        datasets.load(data, data_source="tfds")


def test_labels_of_200_classes_reach_both_sides_unchanged():
    labels = np.arange(200)
    data = dataclasses.replace(recipe.load("map-style").data, test_fraction=0.0)
    held = tables.held_out("wide", np.ones((200, 3)), labels, tuple(map(str, range(200))), data)
    assert np.array_equal(held.train.labels, labels)
    preprocessing = recipe.load("mlp128").preprocessing
    (tensors,) = torch_ref.data.preprocess(held, preprocessing, dtype=torch.float32)
    assert np.array_equal(tensors.tensors[1].numpy(), labels)
