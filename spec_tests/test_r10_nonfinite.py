"""R10: a number that is not finite stops a run, or its step is left out, as set; step and array are named."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from spec import oracle, params, recipe
from spec.batches import epoch_order
from spec.run import checkpoints, faults
from spec.run.history import Position, StepsDone
from spec.run.pace import Pace
from spec.run.session import Session
from spec_tests.assertions import assert_within
from spec_tests.conftest import FRAMEWORKS
from spec_tests.tolerances import run_bound

EXAMPLES, FEATURES, BATCH, EPOCHS = 38, 64, 8, 3  # four full batches and one of six
STEPS_PER_EPOCH = -(-EXAMPLES // BATCH)
BAD = 7  # the index of the example that spoils a step
ORDERS = [epoch_order(0, epoch, EXAMPLES) for epoch in range(1, EPOCHS + 1)]
BAD_STEPS = [int(np.flatnonzero(order == BAD)[0]) // BATCH for order in ORDERS]
FLAGS = (
    "--recipe softmax-regression --data.name map_style --data.test-fraction 0 --data.seed 0 "
    f"--preprocessing.divisor 1 --init.weight uniform_fan_in --init.std None --batch-size {BATCH} --epochs {EPOCHS} "
    "--learning-rate 0.25 "
    "--metrics.progress-every 1 --checkpoint-every epoch --quiet"
).split()
HERE = "spec_tests.test_r10_nonfinite"
both = pytest.mark.parametrize("framework", FRAMEWORKS)
pytestmark = pytest.mark.usefixtures("compiled_once")


def initial_state() -> dict[str, np.ndarray]:
    loaded = recipe.load("softmax-regression")
    init = dataclasses.replace(loaded.init, weight="uniform_fan_in", std=None)
    return params.initial_state(params.leaves(loaded.model, (FEATURES,), 2), init, 0)


class Features:
    """Random features of two classes; `spoil` changes them."""

    classes = ("a", "b")

    def __init__(self) -> None:
        self.inputs = np.random.default_rng(0).normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
        self.spoil()

    def spoil(self) -> None:
        pass

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.inputs[index], index % 2


class OneOverflows(Features):
    """One example is so large that its logits overflow float32."""

    index = BAD

    def spoil(self) -> None:
        signs = np.sign(initial_state()["linear1.weight"][0])
        self.inputs[self.index] = signs * np.finfo(np.float32).max


class EveryUpdateOverflows(Features):
    """Every logit and loss is finite in float32, and the learning rate times the gradient is not."""

    def spoil(self) -> None:
        self.inputs *= np.float32(1e36)


class OneIsNan(Features):
    def spoil(self) -> None:
        self.inputs[BAD, 0] = np.nan


class OneIsInfinite(Features):
    def spoil(self) -> None:
        self.inputs[BAD, 0] = -np.inf


SPOILED = {
    # class: (learning rate, the first step of which something is not finite, what is not)
    OneOverflows: ("0.25", BAD_STEPS[0], "the loss is "),
    EveryUpdateOverflows: ("1e6", 0, "linear1.weight is no longer finite after it"),
}
spoiled = pytest.mark.parametrize("kind", SPOILED, ids=lambda kind: kind.__name__)


def flags(kind: type, out: Path, **more: str) -> list[str]:
    rate = SPOILED[kind][0]
    named = [text for name, value in more.items() for text in (f"--{name.replace('_', '-')}", value)]
    return [*FLAGS, "--data.path", f"{HERE}:{kind.__name__}", "--learning-rate", rate, "--out", str(out), *named]


def lines(run: Path, event: str) -> list[dict]:
    all_lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in all_lines if line["event"] == event]


def test_the_bad_example_stands_where_these_tests_need_it():
    assert BAD_STEPS[0] > 0
    assert len(set(BAD_STEPS)) > 1
    assert np.abs(initial_state()["linear1.weight"][0]).sum() > 3  # times the largest float32, and it moves little


@both
@spoiled
@pytest.mark.parametrize("dump", [(), ("--dump-nonfinite",)], ids=["", "dump"])
def test_a_run_stops_at_the_step_that_spoils_it_and_names_it(kind, dump, framework, trainer_command, tmp_path, counted):
    run, (_, step, what) = tmp_path / "run", SPOILED[kind]
    ended = trainer_command(*flags(kind, run), *dump, framework=framework)
    assert ended.status == 2
    assert ended.err.count("\n") == 1
    assert f"error: epoch 1, step {step}: " in ended.err
    assert what in ended.err
    assert "it diverged; lower learning_rate" in ended.err
    assert not (run / "weights.safetensors").exists()
    assert not (run / "summary.json").exists()
    assert not (run / "checkpoints").exists()
    assert (run / "nonfinite.safetensors").exists() == bool(dump)
    counted("R10 runs with numbers that are not finite", 1)


@both
@spoiled
def test_the_dumped_batch_and_state_do_spoil_a_step(kind, framework, trainer_command, tmp_path):
    run, (rate, step, _) = tmp_path / "run", SPOILED[kind]
    assert trainer_command(*flags(kind, run), "--dump-nonfinite", framework=framework).status == 2
    dumped = load_file(run / "nonfinite.safetensors")
    assert dumped["indices"].tolist() == ORDERS[0][step * BATCH : (step + 1) * BATCH].tolist()
    assert np.array_equal(dumped["inputs"], kind().inputs[dumped["indices"]])
    assert dumped["labels"].tolist() == (dumped["indices"] % 2).tolist()
    weight, bias = dumped["linear1.weight"], dumped["linear1.bias"]
    assert np.isfinite(weight).all()
    assert weight.dtype == np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        logits = dumped["inputs"] @ weight.T + bias
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        errors = shifted / shifted.sum(axis=1, keepdims=True) - np.eye(2, dtype=np.float32)[dumped["labels"]]
        after = weight - np.float32(rate) * (errors.T @ dumped["inputs"] / np.float32(BATCH))
    assert not np.isfinite(after).all()


@both
def test_steps_that_are_skipped_change_nothing_and_count_in_no_mean(framework, trainer_command, tmp_path, counted):
    run = tmp_path / "run"
    ended = trainer_command(*flags(OneOverflows, run, on_nonfinite="skip"), framework=framework)
    assert ended.status == 0, ended.err
    wanted, losses = softmax_regression_without_the_bad_steps()
    found = load_file(run / "weights.safetensors")
    steps, leaves = EPOCHS * STEPS_PER_EPOCH, params.leaves(recipe.load("softmax-regression").model, (FEATURES,), 2)
    bound = run_bound(leaves, BATCH * FEATURES, steps, np.float32)
    assert_within(found, wanted, bound=bound, item=framework, relative_to_layer=True)
    epochs = lines(run, "epoch")
    assert [epoch["nonfinite_steps"] for epoch in epochs] == [1] * EPOCHS
    means = {str(epoch["epoch"]): np.array(epoch["train_loss"], np.float32) for epoch in epochs}
    assert_within(means, losses, bound=bound, item="train_loss", relative_to_layer=True)
    skipped = [line["step"] for line in lines(run, "progress") if line["batch_loss"] is None]
    assert skipped == [STEPS_PER_EPOCH * index + step + 1 for index, step in enumerate(BAD_STEPS)]
    counted("R10 runs with numbers that are not finite", 1)


def softmax_regression_without_the_bad_steps() -> tuple[dict, dict]:
    """Return the weights after the other steps, by the closed form in float64, and each epoch's mean loss."""
    loaded, inputs = recipe.load("softmax-regression"), OneOverflows().inputs.astype(np.float64)
    state = {name: array.astype(np.float64) for name, array in initial_state().items()}
    means = {}
    for epoch, order in enumerate(ORDERS, start=1):
        losses = []
        for start in range(0, EXAMPLES, BATCH):
            batch = order[start : start + BATCH]
            if BAD in batch:
                continue
            logits = inputs[batch] @ state["linear1.weight"].T + state["linear1.bias"]
            losses += oracle.example_losses(logits, batch % 2, loaded.loss).tolist()
            errors = oracle.loss_gradient(logits, batch % 2, loaded.loss)
            state["linear1.weight"] = state["linear1.weight"] - 0.25 * errors.T @ inputs[batch]
            state["linear1.bias"] = state["linear1.bias"] - 0.25 * errors.sum(axis=0)
        means[str(epoch)] = np.array(np.mean(losses), np.float32)
    return state, means


@both
def test_where_every_step_is_skipped_the_initial_state_stays_bit_for_bit(
    framework, trainer_command, tmp_path, counted, monkeypatch
):
    run, states, save = tmp_path / "run", [], Session._save

    def seen(self: Session, **how: bool) -> None:
        states.append(self.trainer.named(self.trainer.snapshot()))
        save(self, **how)

    monkeypatch.setattr(Session, "_save", seen)
    more = ["--momentum", "0.9"]  # whose buffers would stay finite where the weights would not
    ended = trainer_command(*flags(EveryUpdateOverflows, run, on_nonfinite="skip"), *more, framework=framework)
    assert ended.status == 0, ended.err
    buffers = [state[f"optimizer.momentum_buffer.linear1.{name}"] for state in states for name in ("weight", "bias")]
    assert len(buffers) >= 2 * EPOCHS
    assert not any(buffer.any() for buffer in buffers)
    initial = initial_state()
    found = load_file(run / "weights.safetensors")
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in initial.items()
    }
    assert {epoch["train_loss"] for epoch in lines(run, "epoch")} == {None}
    assert {epoch["nonfinite_steps"] for epoch in lines(run, "epoch")} == {STEPS_PER_EPOCH}
    counted("R10 runs with numbers that are not finite", 1)


@both
@spoiled
def test_a_run_that_ignores_them_ends_and_keeps_no_spoiled_checkpoint_or_weights(
    kind, framework, trainer_command, tmp_path, counted
):
    run = tmp_path / "run"
    ended = trainer_command(*flags(kind, run, on_nonfinite="ignore"), framework=framework)
    assert ended.status == 0, ended.err
    assert len(lines(run, "epoch")) == EPOCHS
    assert lines(run, "epoch")[-1]["train_loss"] is None
    assert not (run / "weights.safetensors").exists()
    assert checkpoints.newest_good(run / "checkpoints") == (None, [])
    counted("R10 runs with numbers that are not finite", 1)


@both
@pytest.mark.parametrize("kind", [OneIsNan, OneIsInfinite])
def test_inputs_that_are_not_finite_are_refused_at_the_door(kind, framework, trainer_command, tmp_path, counted):
    path = ["--data.path", f"{HERE}:{kind.__name__}", "--out", str(tmp_path / "run")]
    ended = trainer_command(*FLAGS, *path, framework=framework)
    assert ended.status == 2
    assert "map_style has 1 input values that are not finite" in ended.err
    counted("R10 runs with numbers that are not finite", 1)


@both
@pytest.mark.parametrize("rate", ["nan", "inf"])
def test_a_learning_rate_that_is_not_finite_is_refused(rate, framework, trainer_command, tmp_path, counted):
    ended = trainer_command(*FLAGS, "--learning-rate", rate, "--out", tmp_path / "run", framework=framework)
    assert ended.status == 2
    assert "learning_rate" in ended.err
    assert not (tmp_path / "run").exists()
    counted("R10 runs with numbers that are not finite", 1)


@both
def test_no_finite_run_is_changed_by_watching_for_what_is_not(framework, trainer_command, tmp_path):
    weights = {}
    for way in ("stop", "skip", "ignore"):
        more = ["--data.path", f"{HERE}:Features", "--out", str(tmp_path / way), "--on-nonfinite", way]
        assert trainer_command(*FLAGS, *more, framework=framework).status == 0
        weights[way] = (tmp_path / way / "weights.safetensors").read_bytes()
    assert len(set(weights.values())) == 1


RULES = {
    "momentum": "--momentum 0.9",
    "dampening": "--momentum 0.9 --optimizer.dampening 0.5",
    "adam": "--optimizer.name adam --momentum None --optimizer.dampening None --optimizer.nesterov None "
    "--optimizer.betas 0.9 0.999 --optimizer.epsilon 1e-8",
    "a schedule": "--momentum 0.9 --schedule.name step --schedule.step-epochs 1 --schedule.gamma 0.5",
    "batchnorm": "--momentum 0.9 --model.input-batchnorm True --model.batchnorm-statistics global",
}


@pytest.mark.parametrize(
    ("rule", "first"), [*((rule, False) for rule in RULES), ("dampening", True)], ids=[*RULES, "dampening, first step"]
)
def test_both_frameworks_skip_the_same_and_keep_the_optimiser_and_statistics_as_they_were(
    rule, first, trainer_command, tmp_path, monkeypatch
):
    monkeypatch.setattr(OneOverflows, "index", ORDERS[0][0 if first else 2 * BATCH])
    found = {}
    for framework in FRAMEWORKS:
        run = tmp_path / framework
        more = [*RULES[rule].split(), "--on-nonfinite", "skip"]
        data = ["--data.path", f"{HERE}:OneOverflows", "--out", str(run)]
        ended = trainer_command(*FLAGS, *data, *more, framework=framework)
        assert ended.status == 0, ended.err
        assert [epoch["nonfinite_steps"] for epoch in lines(run, "epoch")] == [1] * EPOCHS
        found[framework] = load_file(run / "weights.safetensors")
        assert checkpoints.newest_good(run / "checkpoints")[0].step == EPOCHS * STEPS_PER_EPOCH
    leaves = params.leaves(recipe.load("softmax-regression").model, (FEATURES,), 2)
    bound = run_bound(leaves, BATCH * FEATURES, EPOCHS * STEPS_PER_EPOCH, np.float32)
    assert_within(found["jax"], found["torch"], bound=bound, item=rule, relative_to_layer=True)


class SquaresOverflow(Features):
    """Logits, losses and gradients are finite in float32, and Adam's squares of the gradients are not."""

    def spoil(self) -> None:
        self.inputs *= np.float32(1e25)


@both
@pytest.mark.parametrize("way", ["stop", "ignore"])
def test_an_optimiser_that_is_not_finite_is_seen_though_its_network_is(way, framework, trainer_command, tmp_path):
    run = tmp_path / "run"
    more = [*RULES["adam"].split(), "--on-nonfinite", way, "--data.path", f"{HERE}:SquaresOverflow", "--out", str(run)]
    ended = trainer_command(*FLAGS, *more, framework=framework)
    assert ended.status == (2 if way == "stop" else 0), ended.err
    assert checkpoints.newest_good(run / "checkpoints") == (None, [])
    assert not (run / "weights.safetensors").exists()
    if way == "stop":
        assert "error: epoch 1, step 0: optimizer.exp_avg_sq.linear1.weight is no longer finite after it" in ended.err


@both
def test_a_dump_outlives_a_run_that_was_to_replace_another(framework, trainer_command, tmp_path):
    run = tmp_path / "run"
    good = ["--data.path", f"{HERE}:Features", "--out", str(run)]
    assert trainer_command(*FLAGS, *good, framework=framework).status == 0
    before = (run / "weights.safetensors").read_bytes()
    ended = trainer_command(*flags(OneOverflows, run), "--overwrite", "--dump-nonfinite", framework=framework)
    assert ended.status == 2
    assert f"its batch and the state before it are in {run / 'nonfinite.safetensors'}" in ended.err
    assert (run / "nonfinite.safetensors").is_file()
    assert (run / "weights.safetensors").read_bytes() == before
    refused = trainer_command(*flags(OneOverflows, run, on_nonfinite="skip"), "--dump-nonfinite", framework=framework)
    assert "--dump-nonfinite is for the step that a run stops at; leave out it or --on-nonfinite skip" in refused.err


@both
def test_a_signal_is_heard_while_the_faulty_step_is_looked_for(framework, trainer_command, tmp_path, monkeypatch):
    find = faults.find

    def told_to_stop(*arguments: object) -> faults.Fault:
        os.kill(os.getpid(), signal.SIGTERM)
        return find(*arguments)

    monkeypatch.setattr(faults, "find", told_to_stop)
    ended = trainer_command(*flags(OneOverflows, tmp_path / "run"), framework=framework)
    assert ended.status == 143
    assert "stopped while looking for the step of epoch 1 after which a number is not finite" in ended.err


class Counter:
    """A trainer whose state is the number of its steps, spoiled by the one of index `bad`; None is none."""

    def __init__(self, bad: int | None) -> None:
        self.bad, self.steps = bad, 0

    def launch(self, epoch: int, start: int, stop: int):
        assert start == self.steps
        self.steps = stop
        sound = self.bad is None or stop <= self.bad
        losses = np.arange(start, stop, dtype=np.float32)
        return lambda: StepsDone(
            epoch=epoch, start=start, stop=stop, losses=losses, num_correct=np.zeros(stop - start), finite=sound
        )

    def snapshot(self) -> int:
        return self.steps

    def restore(self, snapshot: int) -> None:
        self.steps = snapshot

    def named(self, snapshot: int) -> dict[str, np.ndarray]:
        return {"count": np.array(np.nan if self.bad is not None and snapshot > self.bad else snapshot)}


@pytest.mark.parametrize("steps", [1, 5, 64])
@pytest.mark.parametrize("bad", [3, 4, 31, 32, 33, 57, 63])
def test_the_faulty_step_of_a_long_call_is_found_by_halves_with_the_state_before_it(bad, steps):
    found = faults.find(Counter(bad), 3, Position(2, 3), Position(2, 64), Pace(steps=steps))
    assert found == faults.Fault(epoch=2, step=bad, loss=float(bad), leaf="count", snapshot=bad)


def test_a_fault_that_does_not_come_again_is_said(trainer_command, tmp_path, monkeypatch):
    assert faults.find(Counter(None), 3, Position(2, 3), Position(2, 64), Pace(steps=5)) is None
    monkeypatch.setattr(faults, "find", lambda *_: None)
    ended = trainer_command(*flags(OneOverflows, tmp_path / "run"), framework="torch")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "were when the steps were done again: this device does not repeat itself; it diverged" in ended.err
