"""S9: the two runs side by side: every step from the same state, whole runs, the first flip, a change of sides."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch

import torch_ref.trainer
from spec import datasets, oracle, recipe
from spec.datasets.catalog import IDX_SETS
from spec.errors import exit_status
from spec.recipe import Recipe
from spec_tests import tolerances
from spec_tests.adapters import JaxAdapter, OracleAdapter, TorchAdapter
from spec_tests.assertions import assert_identical, assert_no_shared_memory, assert_within
from spec_tests.conftest import made_up_images
from spec_tests.lockstep import __main__ as lockstep
from spec_tests.lockstep.report import Epoch, Forced, Verdict, judge
from spec_tests.lockstep.runs import Pair, StepByStep, by_epochs, decided_on, differing

KINDS = ("mlp128", "sigmoid-mlp", "mlp128-batchnorm", "mnist-mlp256", "breast-cancer", "cnn")
WHOLE_RUNS = [name for name in recipe.recipe_names() if name not in ("csv", "map-style", "cnn")]


def short(name: str, precision: str) -> Recipe:
    """Return a recipe on few examples: its own rule, loss and kind of layers, a small CNN for the CNN."""
    loaded = recipe.load(name)
    model = loaded.model
    if model.name == "cnn":
        model = dataclasses.replace(model, channels=(3, 4), hidden_sizes=(6,))
    return dataclasses.replace(loaded, precision=precision, model=model, batch_size=13, epochs=2)


def pair_of(name: str, precision: str) -> Pair:
    small = short(name, precision)
    if small.data.name in IDX_SETS:
        return Pair.of(small, made_up_images(70, 31))
    return Pair.of(small, datasets.load(small.data))


def assert_in_step(verdict: Verdict) -> None:
    assert verdict.held  # against something, that is
    assert verdict.broken == []


@pytest.mark.parametrize(("name", "precision"), [*((name, "float32") for name in KINDS), ("mnist-mlp256", "float64")])
def test_from_the_same_state_every_step_of_every_kind_of_recipe_agrees(name, precision):
    pair = pair_of(name, precision)
    epochs = list(StepByStep(pair, share_gates=False, watch=True).epochs(max_steps=12))
    assert epochs[-1].forced.steps == epochs[-1].steps >= 10
    assert_in_step(judge(pair.recipe, epochs, share_gates=False))


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("mlp128-batchnorm", "linear1.weight"),
        ("mlp128-batchnorm", "norm0.weight"),
        ("cnn", "conv1.weight"),
        ("cnn", "norm1.weight"),
        ("cnn", "linear1.weight"),
        ("cnn", "linear2.bias"),
    ],
)
def test_a_faulty_update_shows_in_a_forced_step_though_the_weights_hide_it(name, leaf):
    # Without momentum a gradient that is 1 % off moves a weight by 1e-5 of its size or less.
    pair = pair_of(name, "float32")
    run = StepByStep(pair, share_gates=False, watch=True)
    make_step = run.forcing.follower.step

    def faulty(images, labels, **given):
        before = run.forcing.follower.state()
        figures = make_step(images, labels, **given)
        after = run.forcing.follower.state()
        off = before[leaf] + np.float32(1.01) * (after[leaf] - before[leaf])
        run.forcing.follower.load(after | {leaf: off}, run.forcing.follower.opt_state())
        return figures

    run.forcing.follower.step = faulty
    epochs = list(run.epochs(max_steps=3))
    assert epochs[-1].forced.worst_leaf == f"update.{leaf}"
    assert judge(pair.recipe, epochs, share_gates=False).broken


def test_a_run_with_dropout_repeats_whatever_was_drawn_before_it():
    ends = []
    for drawn in (0, 3):
        torch.rand(drawn)
        run = StepByStep(pair_of("cnn", "float32"), share_gates=False, watch=False)
        list(run.epochs(max_steps=4))
        ends.append(run.leader.state())
    assert_identical(*ends, item="torch's weights")


@pytest.mark.parametrize("name", [name for name in KINDS if name != "cnn"])
def test_a_float64_run_ends_within_a_float32_rounding_on_both_sides(name):
    pair = pair_of(name, "float64")
    epochs = list(by_epochs(pair))
    assert [epoch.epoch for epoch in epochs] == [1, 2]
    assert_in_step(judge(pair.recipe, epochs, share_gates=False))
    assert epochs[-1].weight_difference <= tolerances.unit_roundoff(np.float32)


def test_the_cnn_stays_together_in_float64_when_masks_are_handed_over():
    pair = pair_of("cnn", "float64")
    epochs = list(StepByStep(pair, share_gates=False, watch=False).epochs())
    assert_in_step(judge(pair.recipe, epochs, share_gates=False))


def test_a_smooth_network_stays_together_in_float32():
    pair = pair_of("sigmoid-mlp", "float32")
    *_, last = StepByStep(pair, share_gates=False, watch=False).epochs()
    assert last.weight_difference <= tolerances.SMOOTH_RUN_FLOAT32
    assert last.equal_predictions == 1


# The first flip

PLANTED_TIE = 2e-6  # between the two sides' pre-activations: what float32 roundings of a 784-wide sum come to


def near_tie(precision: str = "float32") -> tuple[StepByStep, int]:
    """Return runs that differ in one bias alone, by PLANTED_TIE: unit 5 of the first example is on either side of 0.

    Also the index of that example in the training split.
    """
    small = short("mnist-mlp512", precision)
    small = dataclasses.replace(small, model=dataclasses.replace(small.model, hidden_sizes=(9,), activations=("relu",)))
    run = StepByStep(Pair.of(small, made_up_images(70, 31)), share_gates=False, watch=True)
    batch = next(run.pair.batches(1))
    activations = run.leader.forward(run.pair.train.inputs[batch], train=True).activations
    state = run.leader.state()
    state["linear1.bias"][5] -= activations["linear1"][0, 5]
    for side, shift in ((run.leader, PLANTED_TIE / 2), (run.follower, -PLANTED_TIE / 2)):
        shifted = state["linear1.bias"].copy()
        shifted[5] += shift
        side.load(state | {"linear1.bias": shifted}, side.opt_state())
    return run, int(batch[0])


def test_the_first_flip_is_a_pre_activation_within_rounding_of_zero():
    run, example = near_tie()
    list(run.epochs(max_steps=1))
    flip = run.first_flip
    assert (flip.epoch, flip.step, flip.layer, flip.unit, flip.example) == (1, 0, "relu1", (5,), example)
    assert flip.jax <= 0 < flip.torch
    assert flip.torch - flip.jax <= PLANTED_TIE + 2 * tolerances.KAPPA * run.forcing.moved("relu1")


def test_given_equal_decisions_every_step_agrees_after_the_flip():
    free, _ = near_tie()
    shared, _ = near_tie()
    shared.share_gates = True
    *_, parted = free.epochs()
    *_, together = shared.epochs()
    assert together.forced.steps == together.steps
    assert together.forced.worst_ratio <= tolerances.KAPPA
    # The planted difference is still there; a gate that flips moves a row of weights by far more.
    assert together.weight_difference <= PLANTED_TIE + tolerances.walk_bound(together.steps, np.float32)
    assert parted.weight_difference > 10 * together.weight_difference
    assert together.equal_predictions == 1


def by_hand(pair: Pair) -> tuple[OracleAdapter, OracleAdapter]:
    """Return the oracle after the first step of a run, and the oracle with plain sums after it."""
    exact, plain = OracleAdapter(pair.network), OracleAdapter(pair.network, oracle.PlainSums(pair.recipe.precision))
    batch = next(pair.batches(1))
    leader = TorchAdapter(pair.network)
    torch_ref.trainer.seed_dropout(pair.recipe, 1, 0)
    leader.step(pair.train.inputs[batch], pair.train.labels[batch])
    for side in (exact, plain):
        side.step(pair.train.inputs[batch], pair.train.labels[batch], decisions=leader.last_decisions)
    return exact, plain


@pytest.mark.parametrize(("times", "explained"), [(0.99, True), (1.01, False)])
def test_a_decision_flips_within_kappa_times_what_plain_sums_are_off(times, explained):
    pair = pair_of("mlp128", "float32")
    exact, plain = by_hand(pair)
    moved = np.abs(plain.last_activations["linear1"] - exact.last_activations["linear1"]).max()
    run = StepByStep(pair, share_gates=False, watch=True)
    forward = run.forcing.follower.forward

    def faulty(images, **given):
        """One gate comes out the other way, so far from undecided."""
        own = forward(images, **given)
        own.decisions["relu1"][2, 5] = ~own.decisions["relu1"][2, 5]
        own.activations["linear1"] = own.activations["linear1"].astype(np.float64)
        own.activations["linear1"][2, 5] = -times * tolerances.KAPPA * moved
        return own

    run.forcing.follower.forward = faulty
    epochs = list(run.epochs(max_steps=1))
    assert epochs[-1].forced.flips == 1
    assert epochs[-1].forced.largest_flip == times * tolerances.KAPPA * moved
    broken = judge(pair.recipe, epochs, share_gates=False).broken
    assert [line[:18] for line in broken] == ([] if explained else ["a decision flipped"])


@pytest.mark.parametrize(("times", "allowed"), [(0.9, True), (1.2, False)])
def test_a_leaf_may_be_off_by_kappa_times_what_plain_sums_and_independent_roundings_are(times, allowed):
    pair = pair_of("cnn", "float32")
    exact, plain = by_hand(pair)
    leaf, layer = "momentum_buffer.norm1.weight", ("momentum_buffer.norm1.weight", "momentum_buffer.norm1.bias")
    largest = max(np.abs(exact.opt_state()[name]).max() for name in layer)
    off = max(np.abs(plain.opt_state()[name] - exact.opt_state()[name]).max() for name in layer)
    roundings = math.sqrt(13 * 784) * tolerances.unit_roundoff(np.float32) * largest
    assert 0.9 * (roundings + off) > roundings  # so that what plain sums are off decides
    run = StepByStep(pair, share_gates=False, watch=True)
    step = run.forcing.step

    def faulty(*given, after):
        """Torch's buffer comes out off by so much."""
        state, opt_state = after
        moved = exact.opt_state()[leaf]
        moved[1] += times * tolerances.KAPPA * (roundings + off)
        return step(*given, after=(state, opt_state | {leaf: moved}))

    run.forcing.step = faulty
    epochs = list(run.epochs(max_steps=1))
    assert epochs[-1].forced.broken == (0 if allowed else 1)
    assert epochs[-1].forced.worst_leaf == leaf
    assert epochs[-1].forced.worst_ratio == pytest.approx(times * tolerances.KAPPA, rel=tolerances.SEVEN_DIGITS)


def test_a_pool_decides_on_the_gap_between_the_two_largest_of_a_window():
    window = np.array([[[[1.0, 4.0], [3.5, 2.0]]]])
    assert decided_on({"relu1": window, "pool1": window.max((2, 3))}, "pool1", (0, 0, 0, 0)) == 0.5


def test_masks_are_not_decisions_and_the_first_layer_comes_first():
    ours = {"relu1": np.array([[True, True]]), "dropout1": np.array([[True]]), "relu2": np.array([[False]])}
    theirs = {"relu2": np.array([[True]]), "relu1": np.array([[True, False]]), "dropout1": np.array([[False]])}
    assert list(differing(ours, theirs)) == [("relu1", (0, 1)), ("relu2", (0, 0))]


# What a report calls broken


GOOD = Epoch(
    epoch=1, steps=10, weight_difference=1e-15, loss_difference=0.0, equal_predictions=1.0, jax_accuracy=0.5,
    torch_accuracy=0.5, forced=Forced(
        steps=10, worst_ratio=2.0, worst_leaf="x", broken=0, flips=0, largest_flip=0, worst_flip=0
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "changes", "said"),
    [
        ("float64", {"weight_difference": 2e-12}, "epoch 1: weights differ by 2e-12, allowed 1e-12"),
        ("float64", {"weight_difference": float("nan")}, "weights differ by nan"),
        ("float64", {"equal_predictions": 0.9999}, "99.99% equal predictions, wanted all"),
        (
            "float32",
            {"forced": dataclasses.replace(GOOD.forced, worst_ratio=9.0, broken=3)},
            "3 leaves of",
        ),
        ("float32", {"forced": dataclasses.replace(GOOD.forced, worst_flip=8.5)}, "8.5 times as far from undecided"),
        ("float32", {"forced": dataclasses.replace(GOOD.forced, worst_flip=float("nan"))}, "nan times as far"),
    ],
)
def test_a_broken_bound_is_said(precision, changes, said):
    mlp128 = dataclasses.replace(recipe.load("mlp128"), precision=precision)
    assert_in_step(judge(mlp128, [GOOD], share_gates=False))
    (line,) = judge(mlp128, [dataclasses.replace(GOOD, **changes)], share_gates=False).broken
    assert said in line


@pytest.mark.parametrize("changes", [{"weight_difference": float("nan")}, {"equal_predictions": 0.0}])
def test_runs_with_shared_gates_must_stay_together(changes):
    mlp128 = dataclasses.replace(recipe.load("mlp128"), precision="float32")
    bad = dataclasses.replace(GOOD, forced=None, **changes)
    assert_in_step(judge(mlp128, [dataclasses.replace(GOOD, forced=None)], share_gates=True))
    assert len(judge(mlp128, [bad], share_gates=True).broken) == 1


def test_a_twin_is_believed_until_it_says_nothing():
    adam = dataclasses.replace(recipe.load("mnist-mlp256"), precision="float64")
    near = dataclasses.replace(GOOD, forced=None, twin_difference=1e-14, weight_difference=1e-13)
    assert_in_step(judge(adam, [near], share_gates=False))
    assert judge(adam, [dataclasses.replace(near, weight_difference=1e-9)], share_gates=False).broken
    far = dataclasses.replace(near, twin_difference=1e-3, weight_difference=1e-3)
    assert judge(adam, [far], share_gates=False).held == []


# Crossing over


def test_a_step_on_one_side_leaves_the_other_sides_arrays_alone():
    pair = pair_of("mlp128", "float32")
    images, labels = pair.train.inputs[:13], pair.train.labels[:13]
    ours, theirs = JaxAdapter(pair.network), TorchAdapter(pair.network)
    for giver, taker in ((theirs, ours), (ours, theirs)):
        given = giver.state(), giver.opt_state()
        taker.load(*given)
        for kind, arrays in zip(("state", "opt_state"), given, strict=True):
            assert_no_shared_memory(arrays, getattr(taker, kind)(), item=f"{giver.name} to {taker.name}")
        for stepping, resting in ((giver, taker), (taker, giver)):
            before = copy.deepcopy((resting.state(), resting.opt_state()))
            stepping.step(images, labels)
            assert_identical(resting.state(), before[0], item=f"{resting.name} after a step of {stepping.name}")
            assert_identical(resting.opt_state(), before[1], item=f"{resting.name} after a step of {stepping.name}")
        for arrays in given:
            for array in arrays.values():
                array[...] = 99
        for side in (giver, taker):
            held = [array for name, array in (side.state() | side.opt_state()).items() if name != "step"]
            assert max(float(np.abs(array).max()) for array in held) < 99


@pytest.mark.parametrize("name", ["mlp128", "mlp128-batchnorm", "mnist-mlp256", "cnn"])
def test_a_run_that_changes_sides_and_back_ends_as_one_that_does_not(name):
    pair = pair_of(name, "float64")
    stays, crosses = TorchAdapter(pair.network), (TorchAdapter(pair.network), JaxAdapter(pair.network))
    batches = [*pair.batches(1), *pair.batches(2)]
    for step, batch in enumerate(batches):
        images, labels = pair.train.inputs[batch], pair.train.labels[batch]
        stays.step(images, labels)
        masks = {layer: mask for layer, mask in stays.last_decisions.items() if layer.startswith("dropout")}
        side, other = crosses if step // 3 % 2 == 0 else crosses[::-1]  # every third step, over and back
        if step and step % 3 == 0:
            side.load(other.state(), other.opt_state())
        side.step(images, labels, decisions=masks)
    assert step // 3 >= 3
    assert_within(side.state(), stays.state(), bound=tolerances.FREE_RUN_FLOAT64, item="state")
    assert_within(side.opt_state(), stays.opt_state(), bound=tolerances.FREE_RUN_FLOAT64, item="optimiser's state")


# The command


def command(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["lockstep", *arguments])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = exit_status(lockstep.main)
        except SystemExit as left:
            status = left.code or 0
    return status, out.getvalue(), err.getvalue()


def test_the_command_prints_each_epoch_and_writes_the_report(tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    arguments = ["--recipe", "synthetic-3class", "--precision", "float32", "--epochs", "2", "--json", str(file)]
    status, out, err = command(*arguments, monkeypatch=monkeypatch)
    assert status == 0, out + err
    assert out.count("weights differ by") == 2
    assert "forced steps, worst error ratio" in out
    assert out.splitlines()[-1].startswith("in step")
    report = json.loads(file.read_text())
    assert [epoch["steps"] for epoch in report["epochs"]] == [1, 2]
    assert report["broken"] == []
    assert "jax" in report["backends"]
    assert "torch" in report["backends"]


def test_a_run_that_is_not_in_step_exits_with_1(monkeypatch):
    monkeypatch.setattr(tolerances, "FREE_RUN_FLOAT64", 0.0)
    status, out, _ = command("--recipe", "synthetic-3class", "--epochs", "3", monkeypatch=monkeypatch)
    assert status == 1
    assert "broken: epoch" in out
    assert "not in step" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--recipe mpl128", "did you mean 'mlp128'"),
        ("--recipe digits --epochs 0", "--epochs 0 is not 1 or more"),
        ("--recipe digits --steps -3", "--steps -3 is not 1 or more"),
        ("--recipe digits --precision float16", "invalid choice: 'float16'"),
        ("--recipe digits --data-dir /nowhere", "leave it out"),
        (
            "--recipe synthetic-3class --epochs 1 --json .",
            "--json . is a directory; name a file",
        ),
        (
            "--recipe synthetic-3class --epochs 1 --json README.md/file.json",
            "--json README.md/file.json: README.md is a file, not a directory",
        ),
        (
            "--recipe synthetic-3class --epochs 1 --json /nowhere/file.json",
            "--json /nowhere/file.json: its directory does not exist",
        ),
    ],
)
def test_a_mistake_exits_with_2(arguments, said, monkeypatch):
    status, _, err = command(*arguments.split(), monkeypatch=monkeypatch)
    assert status == 2
    assert said in err


# Whole runs, on the real data


def real_pair(name: str, precision: str, request: pytest.FixtureRequest) -> Pair:
    loaded = dataclasses.replace(recipe.load(name), precision=precision)
    if loaded.data.name in IDX_SETS:
        return Pair.of(loaded, request.getfixturevalue(loaded.data.name))
    return Pair.of(loaded, datasets.load(loaded.data))


@pytest.mark.slow(minutes=20)
@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_a_whole_run_in_float64_stays_together_at_every_epoch(name, request):
    pair = real_pair(name, "float64", request)
    epochs = list(by_epochs(pair))
    assert len(epochs) == pair.recipe.epochs
    assert_in_step(judge(pair.recipe, epochs, share_gates=False))


@pytest.mark.slow(minutes=25)
def test_a_whole_run_of_the_cnn_in_float64_stays_together(request):
    pair = real_pair("cnn", "float64", request)
    epochs = list(StepByStep(pair, share_gates=False, watch=False).epochs())
    assert_in_step(judge(pair.recipe, epochs, share_gates=False))


@pytest.mark.slow(minutes=40)
@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_every_step_of_a_whole_run_in_float32_agrees_from_the_same_state(name, request):
    pair = real_pair(name, "float32", request)
    run = StepByStep(pair, share_gates=False, watch=True)
    epochs = list(run.epochs())
    assert epochs[-1].forced.steps == pair.counts.steps
    assert_in_step(judge(pair.recipe, epochs, share_gates=False))
    parted = epochs[-1].weight_difference > tolerances.SMOOTH_RUN_FLOAT32
    assert run.first_flip is not None or not parted  # nothing parts two runs but a flip
