"""S9: the compiled epoch is the plain loop over batches, step for step, for every choice a recipe makes."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import torch

from jax_impl.parallel import place
from jax_impl.trainer import Trainer
from spec import datasets, params, recipe
from spec.batches import epoch_order
from spec.recipe import Loss, Recipe, Schedule
from spec.run.pace import Pace
from spec_tests.assertions import assert_within
from spec_tests.conftest import made_up_images
from spec_tests.tolerances import FREE_RUN_FLOAT64, formula_bound

CPU = place("cpu")
DATASET = made_up_images(23, 7)


def small_mlp(**changes: object) -> Recipe:
    mlp128 = recipe.load("mlp128")
    model = dataclasses.replace(mlp128.model, hidden_sizes=(6,), bias=True)
    return dataclasses.replace(
        mlp128, model=model, batch_size=5, last_batch="keep", epochs=3, precision="float64", **changes
    )


def loop(small: Recipe, rates: list[float]) -> tuple[list[float], dict[str, np.ndarray]]:
    """Train in NumPy by hand-written backpropagation; return every batch's loss and the final weights."""
    images = (DATASET.train.inputs.astype(np.float32) / np.float32(255)).reshape(23, -1).astype(np.float64)
    leaves = params.leaves(small.model, (28, 28, 1), 10)
    w = {name: array.astype(np.float64) for name, array in params.initial_state(leaves, small.init, small.seed).items()}
    buffers: dict[str, np.ndarray] = {}
    losses = []
    for epoch, rate in enumerate(rates, start=1):
        order = epoch_order(small.seed, epoch, 23)
        for start in range(0, 23, 5):
            batch = order[start : start + 5]
            x, y = images[batch], DATASET.train.labels[batch]
            hidden = np.maximum(x @ w["linear1.weight"].T + w["linear1.bias"], 0)
            logits = hidden @ w["linear2.weight"].T + w["linear2.bias"]
            exps = np.exp(logits - logits.max(axis=1, keepdims=True))
            probabilities = exps / exps.sum(axis=1, keepdims=True)
            losses.append(-np.log(probabilities[np.arange(len(y)), y]).mean())
            by_logits = (probabilities - np.eye(10)[y]) / (1 if small.loss.reduction == "sum" else len(y))
            by_hidden = by_logits @ w["linear2.weight"] * (hidden > 0)
            grads = {
                "linear1.weight": by_hidden.T @ x,
                "linear1.bias": by_hidden.sum(axis=0),
                "linear2.weight": by_logits.T @ hidden,
                "linear2.bias": by_logits.sum(axis=0),
            }
            for name, grad in grads.items():
                buffers[name] = small.optimizer.momentum * buffers.get(name, 0) + grad
                w[name] = w[name] - rate * buffers[name]
    return losses, w


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, [0.15, 0.15, 0.15]),
        ({"loss": Loss(name="cross_entropy", reduction="sum", label_smoothing=0.0)}, [0.15, 0.15, 0.15]),
        ({"schedule": Schedule(name="step", step_epochs=2, gamma=0.1)}, [0.15, 0.15, 0.015]),
        ({"schedule": Schedule(name="cosine", final_learning_rate=0.0)}, [0.15, 0.1125, 0.0375]),
    ],
    ids=["mean", "sum", "step", "cosine"],
)
@pytest.mark.parametrize("steps", [None, 2])
def test_every_loss_and_the_weights_are_those_of_the_plain_loop(changes, rates, steps):
    small = small_mlp(**changes)
    trainer = Trainer(small, DATASET, CPU)
    events = [event for event in trainer.events(pace=Pace(steps=steps)) if hasattr(event, "losses")]
    losses, weights = loop(small, rates)
    found = {"losses": np.concatenate([event.losses for event in events])}
    assert_within(found, {"losses": np.array(losses)}, bound=FREE_RUN_FLOAT64, item="losses")
    assert_within(trainer.state(), weights, bound=FREE_RUN_FLOAT64, item="weights")


@pytest.mark.parametrize("step_epochs", [41, 47])
def test_a_step_schedule_drops_at_its_epoch_in_the_compiled_program(step_epochs):
    # XLA multiplies by the reciprocal where a float is divided: floor(41 * fl(1/41)) is 0.
    schedule = Schedule(name="step", step_epochs=step_epochs, gamma=1e-6)
    small = dataclasses.replace(
        small_mlp(schedule=schedule),
        epochs=step_epochs + 1,
        batch_size=23,
        precision="float32",
    )
    trainer = Trainer(small, DATASET, CPU)
    moved, before = [], trainer.state()["linear2.bias"]
    for event in trainer.events():
        if hasattr(event, "losses"):
            after = trainer.state()["linear2.bias"]
            moved.append(np.abs(after - before).max())
            before = after
    assert moved[step_epochs] < 1e-4 * moved[step_epochs - 1]


def test_the_running_statistics_are_carried_through_the_epoch():
    batchnorm = recipe.load("mlp128-batchnorm")
    small = dataclasses.replace(batchnorm, batch_size=5, epochs=2, precision="float64")
    trainer = Trainer(small, DATASET, CPU)
    list(trainer.events())
    images = (DATASET.train.inputs.astype(np.float32) / np.float32(255)).astype(np.float64)
    mean, var = 0.0, 1.0
    for epoch, start in itertools.product((1, 2), range(0, 23, 5)):
        batch = images[epoch_order(0, epoch, 23)[start : start + 5]]
        mean = 0.9 * mean + 0.1 * batch.mean()
        var = 0.9 * var + 0.1 * batch.var(ddof=1)
    state = trainer.state()
    assert state["norm0.running_mean"][0] == pytest.approx(mean, abs=formula_bound(1.0, np.float64))
    assert state["norm0.running_var"][0] == pytest.approx(var, abs=formula_bound(1.0, np.float64))


def test_every_step_of_every_epoch_has_a_dropout_mask_of_its_own():
    # All examples are one image, and nothing is learned: only the mask can change a batch's loss.
    cnn = recipe.load("cnn")
    same = DATASET.train._replace(inputs=np.repeat(DATASET.train.inputs[:1], 23, axis=0), labels=np.zeros(23, np.int32))
    small = dataclasses.replace(
        cnn,
        model=dataclasses.replace(cnn.model, channels=(2,), hidden_sizes=(32,)),
        optimizer=dataclasses.replace(cnn.optimizer, learning_rate=1e-30),
        batch_size=5,
        last_batch="drop",
        epochs=2,
    )
    trainer = Trainer(small, dataclasses.replace(DATASET, train=same, test=None), CPU)
    trainer._state.params["norm2"]["bias"] = trainer._state.params["norm2"]["bias"] + 1  # so that units are not 0
    losses = np.concatenate([event.losses for event in trainer.events() if hasattr(event, "losses")])
    assert len(set(losses.tolist())) == len(losses) == 8


def test_trainers_of_two_precisions_take_turns_and_leave_the_callers_jax_alone():
    pairs = [Trainer(dataclasses.replace(small_mlp(), precision=name), DATASET, CPU) for name in ("float64", "float32")]
    for double, single in zip(*(trainer.events() for trainer in pairs), strict=True):
        assert jax.numpy.ones(1).dtype == np.float32
        assert type(double) is type(single)
    assert [trainer.state()["linear1.weight"].dtype for trainer in pairs] == [np.float64, np.float32]


def test_the_final_weights_load_into_torch_and_give_the_same_test_losses():
    cnn = recipe.load("cnn")
    model = dataclasses.replace(cnn.model, channels=(3, 5), hidden_sizes=(6,))
    small = dataclasses.replace(cnn, model=model, batch_size=5, epochs=2, precision="float64")
    trainer = Trainer(small, DATASET, CPU)
    *_, last = trainer.events()
    nn = torch.nn
    network = nn.Sequential()
    for index, (inputs, outputs) in enumerate([(1, 3), (3, 5)], start=1):
        network.add_module(f"conv{index}", nn.Conv2d(inputs, outputs, 3, padding=1))
        network.add_module(f"norm{index}", nn.BatchNorm2d(outputs))
        network.add_module(f"relu{index}", nn.ReLU())
        network.add_module(f"pool{index}", nn.MaxPool2d(2))
    network.add_module("flatten", nn.Flatten())
    for name, layer in {"linear1": nn.Linear(245, 6), "norm3": nn.BatchNorm1d(6), "relu3": nn.ReLU()}.items():
        network.add_module(name, layer)
    network.add_module("linear2", nn.Linear(6, 10))
    network.double().eval()
    weights = {name: torch.from_numpy(array) for name, array in trainer.state().items()}
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    images = datasets.preprocess(DATASET, small.preprocessing).test.inputs.transpose(0, 3, 1, 2)
    with torch.no_grad():
        logits = network(torch.from_numpy(images.astype(np.float64)))
        losses = nn.functional.cross_entropy(logits, torch.from_numpy(DATASET.test.labels).long(), reduction="none")
    assert_within({"losses": last.test_losses}, {"losses": losses.numpy()}, bound=FREE_RUN_FLOAT64, item="torch")
