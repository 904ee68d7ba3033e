"""The compiled programs of a run: how many, what is in them, and that they are kept on disk."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_impl import models
from jax_impl.background import in_background
from jax_impl.layers import conv_general_dilated
from jax_impl.parallel import place
from jax_impl.programs import compile_programs
from jax_impl.trainer import Trainer, prepare
from spec import datasets
from spec import recipe as recipes
from spec.datasets.sizes import size_of
from spec_tests.conftest import made_up_images

CPU = place("cpu")
CNN = recipes.load("cnn")
SMALL_CNN = dataclasses.replace(
    CNN, model=dataclasses.replace(CNN.model, channels=(5, 7), hidden_sizes=(4,)), batch_size=6, epochs=2
)
MLP128 = recipes.load("mlp128")
SMALL_MLP = dataclasses.replace(
    MLP128, model=dataclasses.replace(MLP128.model, hidden_sizes=(4,)), batch_size=6, epochs=2
)
# Counts what XLA compiles, then runs the trainer with the arguments.
COUNTING = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import jax
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
from jax_impl.train import main
main(sys.argv[1:])
print(f"compiled {len(compiled)}, of them from the cache {len(hits)}")
"""


def counted(tmp_path: Path, *flags: object, out: str = "out", **environment: str) -> str:
    """Run the trainer in a process of its own; return what it says was compiled."""
    ended = subprocess.run(
        [sys.executable, "-c", COUNTING, *map(str, flags), "--quiet", "--out", str(tmp_path / out)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout.splitlines()[-1]


@pytest.mark.parametrize("flags", [(), ("--seeds", 3), ("--optimizer.weight-decay", 0.1, "--last-batch", "drop")])
def test_a_run_compiles_two_programs_however_many_epochs_it_has(flags, tmp_path):
    said = counted(tmp_path, "--recipe", "digits", "--epochs", 3, *flags)
    assert said == "compiled 2, of them from the cache 0"


def test_the_second_run_compiles_nothing_and_gives_the_same_bits(tmp_path):
    cache = {"LOCKSTEP_CACHE": str(tmp_path / "cache"), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    flags = ("--recipe", "digits", "--epochs", 2)
    assert counted(tmp_path, *flags, out="first", **cache).endswith("from the cache 0")
    assert counted(tmp_path, *flags, out="second", **cache) == "compiled 2, of them from the cache 2"
    first, second = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    cache = {"LOCKSTEP_CACHE": str(tmp_path / "file"), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    assert counted(tmp_path, "--recipe", "digits", "--epochs", 1, **cache).startswith("compiled 2")


def test_a_damaged_entry_of_the_cache_is_compiled_again(tmp_path):
    cache = {"LOCKSTEP_CACHE": str(tmp_path / "cache"), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    flags = ("--recipe", "digits", "--epochs", 1)
    counted(tmp_path, *flags, out="first", **cache)
    entries = list((tmp_path / "cache").rglob("*-cache"))
    assert len(entries) == 2
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:100])
    ended = subprocess.run(
        [sys.executable, "-m", "jax_impl.train", *map(str, flags), "--quiet", "--out", str(tmp_path / "second")],
        capture_output=True,
        text=True,
        env=os.environ | cache,
    )
    assert ended.returncode == 0
    first, second = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_the_compiled_cpu_epoch_convolves_only_in_the_layout_that_xla_has_kernels_for(stock, monkeypatch):
    # XLA:CPU writes any other convolution, that of the stock kernel gradient among them, as a plain loop.
    if stock:
        monkeypatch.setattr(models, "conv_general_dilated", jax.lax.conv_general_dilated)
    text = Trainer(SMALL_CNN, made_up_images(15, 3), CPU)._run_steps.as_text()
    layouts = re.findall(r" convolution\(.*?dim_labels=([\w>-]+)", text)
    assert layouts
    assert (set(layouts) == {"b01f_01io->b01f"}) == (not stock)


def operations(of: recipes.Recipe, mode: str) -> list[tuple[str, str]]:
    """Return the operations of the compiled steps and evaluation, each with the shape and layout of what it returns."""
    programs = compile_programs(of, size_of(made_up_images(15, 3)), place("cpu", parallel=mode))
    text = programs.run_steps.as_text() + programs.evaluate.as_text()
    return sorted(re.findall(r"^ *(?:ROOT )?%?[\w.-]+ = (.+?) ([a-z-]+)\(", text, re.MULTILINE))


@pytest.mark.parametrize("of", [SMALL_MLP, SMALL_CNN], ids=["mlp", "cnn"])
def test_sharded_on_one_device_is_compiled_to_the_operations_of_jit(of):
    alone = operations(of, "jit")
    assert len(alone) > 100
    assert operations(of, "sharded") == alone


def test_programs_are_made_without_the_data_and_give_what_a_trainer_alone_gives():
    dataset = made_up_images(15, 3)
    before = compile_programs(SMALL_MLP, size_of(dataset), CPU)
    given, own = Trainer(SMALL_MLP, dataset, CPU, programs=before), Trainer(SMALL_MLP, dataset, CPU)
    for _ in zip(given.events(), own.events(), strict=True):
        pass
    for name, array in own.state().items():
        assert np.array_equal(given.state()[name], array), name


def test_what_fails_in_the_background_is_raised_where_it_is_asked_for():
    assert in_background(divmod, 7, 2).result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        in_background(divmod, 7, 0).result()


def test_the_training_split_is_one_byte_a_pixel_on_the_device():
    trainer = Trainer(SMALL_MLP, made_up_images(15, 3), CPU)
    assert trainer.train_split.inputs.nbytes == 15 * 28 * 28


def test_a_second_trainer_of_what_was_prepared_has_a_state_of_its_own():
    digits = recipes.load("digits")
    trainer_of, dataset = prepare(digits, CPU), datasets.load(digits.data)
    first, second = trainer_of(dataset), trainer_of(dataset)
    first.train(3)
    second.train(3)
    for name, array in first.state().items():
        assert np.array_equal(second.state()[name], array), name


def test_a_convolution_with_holes_or_groups_is_left_to_xla():
    options = {"padding": 1, "kernel_dilation": 2, "feature_group_count": 2}
    ours, stock = (
        nnx.Conv(2, 2, (3, 3), **options, rngs=nnx.Rngs(0), conv_general_dilated=convolve)
        for convolve in (conv_general_dilated, jax.lax.conv_general_dilated)
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 6, 2)), jnp.float32)
    assert np.array_equal(ours(x), stock(x))
