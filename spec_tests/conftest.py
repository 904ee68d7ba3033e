"""What the tests share: real data where it is, made-up images where it does not matter, the command line in-process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # in what the tests start: no run depends on an earlier one

import jax_impl.train
import jax_impl.trainer
import torch_ref.train
from jax_impl.parallel import Placement
from jax_impl.programs import Programs, compile_programs
from jax_impl.trainer import Trainer
from spec import datasets
from spec.datasets import Dataset, Split, cache, catalog
from spec.datasets.catalog import IDX_SETS, IdxFile, IdxSet
from spec.datasets.sizes import Size, size_of
from spec.errors import exit_status
from spec.recipe import Data, Recipe

SHARED_MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"

COUNTED = "counted"
COMPILED = "LOCKSTEP_TESTS_COMPILED"

FRAMEWORKS = {"jax": jax_impl.train.main, "torch": torch_ref.train.main}


class Ended(NamedTuple):
    """How a command ended: exit status, standard output, standard error."""

    status: int
    out: str
    err: str


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Return a function that has the run's last lines say how many of something a test has put through.

    Nothing counts as nothing: a number under 1 fails the test.
    """

    def count(what: str, number: int) -> None:
        assert number > 0, f"{what}: none at all"
        record_property(COUNTED, (what, number))

    return count


def pytest_configure(config: pytest.Config) -> None:
    """Have what the tests compile kept for all of their processes, for as long as they run."""
    if not hasattr(config, "workerinput"):
        os.environ[COMPILED] = tempfile.mkdtemp(prefix="lockstep-tests-")
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # as jax_impl.train says
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", os.environ[COMPILED])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove it with the last of them."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[COMPILED], ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests that passed have counted."""
    totals: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties if report.when == "call" else ():
            if name == COUNTED:
                totals[value[0]] += value[1]
    if totals:
        terminalreporter.section("counted")
        for what, number in sorted(totals.items()):
            terminalreporter.write_line(f"{what}: {number:,}")


@pytest.fixture
def trainer_command() -> Callable[..., Ended]:
    """Return a function that runs a framework's trainer with its arguments, in this process."""

    def command(*arguments: object, framework: str = "jax") -> Ended:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = exit_status(lambda: FRAMEWORKS[framework]([str(argument) for argument in arguments]))
            except SystemExit as left:
                status = left.code or 0
        return Ended(status, out.getvalue(), err.getvalue())

    return command


@functools.cache
def _programs(recipe: Recipe, size: Size, placement: Placement, skips: bool) -> Programs:
    made = compile_programs(recipe, size, placement, skips=skips)
    return made._replace(state=jax.tree.map(np.array, made.state))


@pytest.fixture
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every JAX run of a recipe the same compiled programs, where it is not the compiler that is tested."""

    def prepare(recipe: Recipe, placement: Placement, *, skips: bool = False) -> Callable[[Dataset], Trainer]:
        def trainer(dataset: Dataset) -> Trainer:
            # No program depends on the number of epochs but by a schedule that runs to the last.
            same = recipe if recipe.schedule.name == "cosine" else dataclasses.replace(recipe, epochs=1, expected=None)
            made = _programs(same, size_of(dataset), placement, skips)
            state = placement.put(jax.tree.map(np.array, made.state))
            return Trainer(recipe, dataset, placement, programs=made._replace(state=state))

        return trainer

    changed = dataclasses.replace(jax_impl.trainer.IMPLEMENTATION, prepare=prepare)
    monkeypatch.setattr(jax_impl.trainer, "IMPLEMENTATION", changed)


@pytest.fixture(scope="session")
def fashion_mnist() -> Dataset:
    """Return the real Fashion-MNIST; skip where no source has it (`make test` fetches it)."""
    if cache.missing_files(IDX_SETS["fashion_mnist"]):
        pytest.skip("Fashion-MNIST is not in the cache; `python -m spec.datasets fetch fashion_mnist` fetches it")
    return datasets.load(Data(name="fashion_mnist"))


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    """Return the real MNIST, from the cache or from the shared copy; skip where there is neither."""
    if not cache.missing_files(IDX_SETS["mnist"]):
        return datasets.load(Data(name="mnist"))
    if not SHARED_MNIST.is_dir():
        pytest.skip(f"MNIST is not in the cache, and {SHARED_MNIST} is not there")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("LOCKSTEP_CACHE", stack.enter_context(tempfile.TemporaryDirectory()))
        return datasets.load(Data(name="mnist"), data_dir=SHARED_MNIST)


def made_up_images(num_train: int, num_test: int, *, seed: int = 0) -> Dataset:
    """Return random images [n, 28, 28, 1] uint8 of ten classes; class k is brighter in row k, so it can be learned."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, num_train + num_test).astype(np.int32)
    images = generator.integers(0, 100, (len(labels), 28, 28, 1), dtype=np.uint8)
    images[np.arange(len(labels)), labels * 2] += 150
    return Dataset(
        name="made_up",
        train=Split(images[:num_train], labels[:num_train]),
        test=Split(images[num_train:], labels[num_train:]),
        class_names=tuple("0123456789"),
    )


class MadeUpImages:
    """A map-style data set of 260 images, as a user would write one: length, items, class names."""

    classes = tuple("0123456789")

    def __init__(self) -> None:
        self.images, self.labels = made_up_images(260, 1).train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


ARRAYS = {
    "train-images-idx3-ubyte": np.arange(6 * 28 * 28, dtype=np.uint8).reshape(6, 28, 28),
    "train-labels-idx1-ubyte": np.array([0, 1, 2, 3, 4, 9], np.uint8),
    "t10k-images-idx3-ubyte": np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)[:, ::-1],
    "t10k-labels-idx1-ubyte": np.array([5, 6], np.uint8),
}
CONTENTS = {name: idx_bytes(array) for name, array in ARRAYS.items()}


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> IdxSet:
    """A data set of eight images in place of Fashion-MNIST, an empty cache, and no source but those a test gives."""
    files = tuple(
        IdxFile(name=name, shape=array.shape, sha256=hashlib.sha256(CONTENTS[name]).hexdigest())
        for name, array in ARRAYS.items()
    )
    tiny = dataclasses.replace(IDX_SETS["fashion_mnist"], files=files, mirrors=(), debian_package=None)
    monkeypatch.setitem(catalog.IDX_SETS, "fashion_mnist", tiny)
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    return tiny
