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
from jax_impl.trainer import IMPLEMENTATION, Trainer
from spec import oracle, params, recipe
from spec.errors import UserError
from spec.sweep import ManyFlags
from spec_tests.adapters import Arrays
from spec_tests.assertions import assert_identical, assert_within, largest_difference
from spec_tests.lockstep.runs import Pair
from spec_tests.parallel_runs import RESTORED, few, runs
from spec_tests.parallel_steps import forced_steps
from spec_tests.tolerances import KAPPA, SEVERAL_DEVICES

MODES, DEVICES = ("sharded", "pmap"), (1, 2, 3, 4, 8)
STATE = ("sharded+state:2", "sharded+state:4")  # 3 divides no array of mlp128: each would stay whole
ALL = (*(f"{mode}:{devices}" for mode in MODES for devices in DEVICES), *STATE)
FEW = ("sharded:3", "pmap:3", "sharded+state:2")  # 3 does not divide a batch of 16, and few arrays divide by it
MORE = (*FEW, "sharded:1", "pmap:1", "sharded:8", "pmap:8")


def small(name: str, **changes: object) -> recipe.Recipe:
    of = dataclasses.replace(recipe.load(name), epochs=1, expected=None, batch_size=16, last_batch="keep")
    return dataclasses.replace(of, **changes)


MLP, CNN = recipe.load("mlp128"), recipe.load("cnn")
NORMED = {"input_batchnorm": True, "batchnorm_statistics": "global"}
SMALL = {
    "mlp": small("mlp128", model=dataclasses.replace(MLP.model, hidden_sizes=(12,), **NORMED)),
    "cnn": small("cnn", model=dataclasses.replace(CNN.model, channels=(3,), hidden_sizes=(6,), dropout=0.5)),
    "sum": small("mlp128", loss=dataclasses.replace(MLP.loss, reduction="sum"), last_batch="drop"),
}


def assert_same_runs(found: dict, precision: str, *, places: tuple[str, ...]) -> None:
    """Assert that every run is that of one device: state, optimiser, losses, answers; and that two programs were
    compiled, in whose steps no rows move from device to device."""
    alone = found["jit:1"]
    assert len(alone) > 10
    for name in places:
        run = found[name]
        assert run.keys() == alone.keys()
        assert int(run["compiled"]) == 2, name
        assert (run["held"] < 0.6 * alone["held"]) == ("+state" in name), name
        assert bool(run["gathers"]) == ("+state" in name), name
        for item in ("num_correct", "test_correct"):
            assert np.array_equal(run[item], alone[item]), (name, item)
        for item in alone:
            if run[item].dtype.kind == "f":
                assert np.abs(run[item] - alone[item]).max(initial=0) <= SEVERAL_DEVICES[precision], (name, item)


@pytest.mark.parametrize("kind", SMALL)
def test_several_devices_train_the_run_of_one(kind, tmp_path, fashion_mnist, counted):
    places = MORE if kind == "mlp" else FEW
    of = dataclasses.replace(SMALL[kind], precision="float64")
    found = runs(tmp_path, of, 7, ["jit:1", *places])
    assert_same_runs(found, "float64", places=places)
    assert len(found[RESTORED]) == (len(places) + 1) ** 2
    assert all(found[RESTORED].values())
    counted("R11 runs on several devices", len(places))
    counted("R11 states saved on some devices and restored on others", len(found[RESTORED]))


def local(kind: str) -> recipe.Recipe:
    """Return a recipe whose batches of 20 leave the last of 8 devices no row, and its last one of 10 the last three."""
    of = SMALL[kind]
    changed = {"batchnorm_statistics": "local"} | ({"dropout": 0.0} if kind == "cnn" else {})
    return dataclasses.replace(of, precision="float64", batch_size=20, model=dataclasses.replace(of.model, **changed))


def shards_by_themselves(of: recipe.Recipe, steps: int, devices: int) -> Arrays:
    """Return the oracle's run in which each device's rows go through the network by themselves (S11.4)."""
    pair = Pair.of(of, few(of, steps))
    state = params.initial_state(pair.network.leaves, of.init, of.seed)
    opt_state = oracle.initial_opt_state(of.optimizer, {name: state[name] for name in pair.network.trained})
    losses = []
    for batch in pair.batches(1):
        own, grads, loss = -(-len(batch) // devices), dict.fromkeys(pair.network.trained, 0.0), 0.0
        shards = [batch[start : start + own] for start in range(0, len(batch), own)]
        passes = [oracle.forward(of.model, state, pair.train.inputs[shard], train=True) for shard in shards]
        for shard, passed in zip(shards, passes, strict=True):
            labels, share = pair.train.labels[shard], len(shard) / len(batch)
            found = oracle.backward(passed, oracle.loss_gradient(passed.logits, labels, of.loss))
            grads = {name: grad + share * found[name] for name, grad in grads.items()}
            loss += share * oracle.example_losses(passed.logits, labels, of.loss).mean()
        trained = {name: state[name] for name in grads}
        moved, opt_state = oracle.update(of.optimizer, of.optimizer.learning_rate, trained, grads, opt_state)
        state = {name: (moved | passes[0].batch_stats)[name] for name in state}
        losses.append(loss)
    logits = oracle.forward(of.model, state, pair.scored.inputs, train=False).logits
    test_losses = oracle.example_losses(logits, pair.scored.labels, of.loss)
    named = {f"state.{name}": array for name, array in state.items()}
    return named | {"losses": np.array(losses), "test_losses": test_losses}


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_local_statistics_are_of_each_devices_own_rows_and_those_of_the_first_run(kind, tmp_path, fashion_mnist):
    of, places = local(kind), ("pmap:3", "sharded:8", "pmap:8")
    found, truths = runs(tmp_path, of, 3, places), {}
    for name in places:
        devices = int(name.split(":")[1])
        wanted = truths[devices] = shards_by_themselves(of, 3, devices)
        ours = {item: found[name][item] for item in wanted}
        assert_within(ours, wanted, bound=SEVERAL_DEVICES["float64"], item=name)
        assert int(found[name]["gathers"]) == 0, name
    assert largest_difference(truths[3], truths[8]) > 1e-4  # how a batch is divided tells


def test_on_one_device_local_statistics_are_global_to_the_bit(tmp_path, fashion_mnist):
    of, states = local("cnn"), []
    for statistics in ("local", "global"):
        model = dataclasses.replace(of.model, batchnorm_statistics=statistics)
        dataset = few(of, 2)
        trainer = Trainer(dataclasses.replace(of, model=model), dataset, place("cpu"))
        list(trainer.events())
        states.append(trainer.state())
    assert_identical(*states, item="local and global")


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
        assert np.abs(spread[name] - alone[name]).max() <= SEVERAL_DEVICES["float32"], name
    refused = subprocess.run([*train, "--parallel", mode, "--devices", "0"], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (2, "error: --devices 0 are none; use 1 at least\n")


@pytest.mark.slow(minutes=5)
@pytest.mark.parametrize(("name", "precision"), [*(("mlp128", of) for of in SEVERAL_DEVICES), ("cnn", "float64")])
def test_after_100_steps_of_a_whole_recipe_the_weights_are_those_of_one_device(
    name, precision, tmp_path, fashion_mnist, counted
):
    of = dataclasses.replace(recipe.load(name), epochs=1, expected=None, precision=precision, last_batch="keep")
    found = runs(tmp_path, of, 100, ["jit:1", *ALL])
    assert_same_runs(found, precision, places=ALL)
    counted("R11 runs on several devices", len(ALL))


def assert_every_step_agrees(folder, of: recipe.Recipe, steps: int, places: tuple[str, ...]) -> None:
    """Assert that in float32 every step from the state of one device agrees by the rule, and flips near-ties alone."""
    for name, forced in forced_steps(folder, of, steps, places).items():
        assert forced.steps == steps
        assert forced.broken == 0, f"{name}: {forced}"
        assert forced.worst_flip <= KAPPA, f"{name}: {forced}"


def test_in_float32_a_step_of_a_small_cnn_agrees_from_the_state_of_one_device(tmp_path, fashion_mnist):
    assert_every_step_agrees(tmp_path, SMALL["cnn"], 4, FEW)


@pytest.mark.slow(minutes=15)
def test_in_float32_each_of_100_steps_of_the_cnn_agrees_from_the_state_of_one_device(tmp_path, fashion_mnist, counted):
    of = dataclasses.replace(recipe.load("cnn"), epochs=1, expected=None, last_batch="keep")
    places = tuple(f"{mode}:{devices}" for mode in MODES for devices in (2, 8))
    assert_every_step_agrees(tmp_path, of, 100, places)
    counted("S11.3 forced steps on several devices", 100 * len(places))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("size", "devices", "said"),
    [
        (250, 8, "batch_size 250 is not divisible by 8 devices; use 248 or 256"),
        (7, 8, "an epoch's last batch of 7 is less than 8 devices; use 7 in all, or fewer, or last_batch drop"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_sizes(mode, size, devices, said):
    one = place("cpu").devices[0]
    with pytest.raises(UserError, match=said):
        Placement(mode, (one,) * devices, "refuse").check_divides([256, size])
    Placement(mode, (one,) * devices, "pad").check_divides([256, 250])


def test_a_batch_of_every_step_that_is_less_than_the_devices_is_no_last_one():
    with pytest.raises(UserError, match=r"^a batch of 7 is less than 8 devices; use 7 in all, or fewer$"):
        Placement("sharded", (place("cpu").devices[0],) * 8).check_divides([7])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [8, 9, 22])  # 1 each; 2, 2, 2, 2, 1 and none; 3, ..., 3, 1
def test_local_statistics_of_a_single_example_are_refused_and_a_device_may_have_none(mode, size):
    placement = Placement(mode, (place("cpu").devices[0],) * 8)
    placement.check_divides([10, 16, 20], alone=True)  # 2, 2, 2, 2, 2 and none; 2 each; 3, ..., 3, 2 and none
    placement.check_divides([size])
    with pytest.raises(UserError, match=f"a batch of {size} leaves one of 8 devices a single example"):
        placement.check_divides([size], alone=True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"devices": 0}, "--devices 0 are none; use 1 at least"),
        (
            {"devices": 2, "parallel": "jit"},
            "--parallel jit is for one device, and --devices is 2; use sharded or pmap",
        ),
        ({"shard_state": True}, "--shard-state divides .*, and this is jit on 1 device; use --parallel sharded and"),
        ({"shard_state": True, "parallel": "pmap"}, "--shard-state divides .*, and this is pmap on 1 device;"),
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
