"""S11, R11: on however many devices, divided however, a run is the one on one device."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_impl import parallel
from jax_impl.parallel import Placement, place
from jax_impl.trainer import IMPLEMENTATION
from spec import recipe
from spec.errors import UserError
from spec.sweep import ManyFlags
from spec_tests.parallel_runs import RESTORED, runs

BOUNDS = {"float32": 1e-5, "float64": 1e-12}
MODES, DEVICES = ("sharded", "pmap"), (1, 2, 3, 4, 8)
STATE = ("sharded+state:2", "sharded+state:3")
ALL = (*(f"{mode}:{devices}" for mode in MODES for devices in DEVICES), *STATE)
FEW = ("sharded:3", "pmap:3", "sharded+state:2")  # 3 does not divide a batch of 16, and few arrays divide by it


def small(name: str, **changes: object) -> recipe.Recipe:
    of = dataclasses.replace(recipe.load(name), epochs=1, expected=None, batch_size=16, last_batch="keep")
    return dataclasses.replace(of, **changes)


MLP, CNN = recipe.load("mlp128"), recipe.load("cnn")
SMALL = {
    "mlp": small("mlp128", model=dataclasses.replace(MLP.model, hidden_sizes=(12,), input_batchnorm=True)),
    "cnn": small("cnn", model=dataclasses.replace(CNN.model, channels=(3,), hidden_sizes=(6,), dropout=0.5)),
    "sum": small("mlp128", loss=dataclasses.replace(MLP.loss, reduction="sum"), last_batch="drop"),
}


def assert_same_runs(found: dict, precision: str, *, places: tuple[str, ...]) -> None:
    """Assert that every run is that of one device: state, optimiser, losses, answers; and that two programs were
    compiled."""
    alone = found["jit:1"]
    assert len(alone) > 10
    for name in places:
        run = found[name]
        assert run.keys() == alone.keys()
        assert int(run["compiled"]) == 2, name
        assert (run["held"] < 0.6 * alone["held"]) == ("+state" in name), name
        for item in ("num_correct", "test_correct"):
            assert np.array_equal(run[item], alone[item]), (name, item)
        for item in alone:
            if run[item].dtype.kind == "f":
                assert np.abs(run[item] - alone[item]).max(initial=0) <= BOUNDS[precision], (name, item)


@pytest.mark.parametrize("kind", SMALL)
def test_several_devices_train_the_run_of_one(kind, tmp_path, fashion_mnist, counted):
    places = ALL if kind == "mlp" else FEW
    of = dataclasses.replace(SMALL[kind], precision="float64")
    found = runs(tmp_path, of, 7, ["jit:1", *places])
    assert_same_runs(found, "float64", places=places)
    assert len(found[RESTORED]) == (len(places) + 1) ** 2
    assert all(found[RESTORED].values())
    counted("R11 runs on several devices", len(places))
    counted("R11 states saved on some devices and restored on others", len(found[RESTORED]))


@pytest.mark.parametrize("mode", MODES)
def test_the_command_trains_on_several_devices_and_goes_on_with_another_number(mode, tmp_path):
    flags = ["--recipe", "digits", "--quiet", "--platform", "cpu"]
    train = [sys.executable, "-m", "jax_impl.train", *flags]
    spread = [*train, "--parallel", mode, "--out", str(tmp_path / "spread")]
    more = ["--resume-with-changes", "--epochs", "2"]
    for command in (
        [*spread, "--devices", "3", "--epochs", "1"],
        [*spread, "--devices", "2", *more],
        [*train, "--epochs", "2", "--out", str(tmp_path / "alone")],
    ):
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    config = json.loads((tmp_path / "spread" / "config.json").read_text())
    assert config["devices"] == ["cpu:cpu:0", "cpu:cpu:1"]
    spread, alone = (load_file(tmp_path / name / "weights.safetensors") for name in ("spread", "alone"))
    for name in alone:
        assert np.abs(spread[name] - alone[name]).max() <= BOUNDS["float32"], name
    refused = subprocess.run([*train, "--parallel", mode, "--devices", "0"], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (2, "error: --devices 0 are none; use 1 at least\n")


@pytest.mark.slow(minutes=5)
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", ["mlp128", "cnn"])
def test_after_100_steps_of_a_whole_recipe_the_weights_are_those_of_one_device(
    name, precision, tmp_path, fashion_mnist, counted
):
    of = dataclasses.replace(recipe.load(name), epochs=1, expected=None, precision=precision, last_batch="keep")
    found = runs(tmp_path, of, 100, ["jit:1", *ALL])
    assert_same_runs(found, precision, places=ALL)
    counted("R11 runs on several devices", len(ALL))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("size", "devices", "said"),
    [
        (250, 8, "batch_size 250 is not divisible by 8 devices; use 248 or 256"),
        (7, 8, "a batch of 7 is less than 8 devices; use --devices 7 or less"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_sizes(mode, size, devices, said):
    one = place("cpu").devices[0]
    with pytest.raises(UserError, match=said):
        Placement(mode, (one,) * devices, "refuse").check_divides([256, size])
    Placement(mode, (one,) * devices, "pad").check_divides([256, 250])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"devices": 0}, "--devices 0 are none; use 1 at least"),
        (
            {"devices": 2, "parallel": "jit"},
            "--parallel jit is for one device, and --devices is 2; use sharded or pmap",
        ),
        ({"shard_state": True}, "--shard-state divides the state as sharded does the batch, and this is jit"),
        ({"shard_state": True, "parallel": "pmap"}, "--shard-state divides the state .*, and this is pmap"),
        ({"devices": 99}, "--devices 99 is more than there are: 1 cpu device; use 1 or less"),
    ],
)
def test_devices_that_are_not_there_are_refused(flags, said):
    place("cpu")  # from now on the CPU is not divided any further
    with pytest.raises(UserError, match=said):
        place("cpu", **flags)


def test_a_run_takes_all_of_an_accelerators_devices_and_what_does_not_ask_takes_one(monkeypatch):
    there = [
        Mock(spec=jax.Device, platform="gpu", process_index=0) for _ in range(2)
    ]  # beartype asks them whether they are devices
    monkeypatch.setattr(parallel, "_devices", lambda platform: there)
    assert place(None) == Placement("sharded", tuple(there))
    asked = ManyFlags(config=recipe.load("digits")).devices_asked()
    assert IMPLEMENTATION.select_device(**asked) == Placement("sharded", tuple(there))
    assert IMPLEMENTATION.select_device(None) == Placement("jit", (there[0],))  # evaluate, predict, several runs
