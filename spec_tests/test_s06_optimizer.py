"""S6: SGD in all its variants, Adam and the schedules, against their recurrences written out in NumPy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_impl import optim
from jax_impl.trainer import precision_scope
from spec import recipe
from spec.recipe import Recipe, Schedule

MLP128 = recipe.load("mlp128")


def with_optimizer(**changes: object) -> Recipe:
    return dataclasses.replace(MLP128, optimizer=dataclasses.replace(MLP128.optimizer, **changes))


def descend(changed: Recipe, start: np.ndarray, grads: np.ndarray, *, steps_per_epoch: int = 10_000) -> np.ndarray:
    """Return the parameter after each of `grads`, in float64."""
    with precision_scope("float64"):
        rule = optim.optimizer(changed, steps_per_epoch)
        parameter = jnp.asarray(start)
        state, path = rule.init(parameter), []
        for grad in grads:
            updates, state = rule.update(jnp.asarray(grad), state, parameter)
            parameter = optax.apply_updates(parameter, updates)
            path.append(np.asarray(parameter))
    return np.array(path)


def torch_sgd(start, grads, *, rates, momentum, dampening=0.0, nesterov=False, weight_decay=0.0) -> np.ndarray:
    """torch's documented loop: the buffer starts as the first gradient, undamped."""
    parameter, buffer, path = np.array(start, float), None, []
    for grad, rate in zip(grads, rates, strict=True):
        decayed = grad + weight_decay * parameter
        buffer = decayed if buffer is None else momentum * buffer + (1 - dampening) * decayed
        parameter = parameter - rate * (decayed + momentum * buffer if nesterov else buffer)
        path.append(parameter)
    return np.array(path)


def test_the_lessons_step_goes_from_10_and_7_5_to_5_and_2_5():
    path = descend(with_optimizer(learning_rate=1.0, momentum=0.0), np.array([10, 7.5]), np.array([[5.0, 5.0]]))
    assert path.tolist() == [[5, 2.5]]


def test_second_step_adds_mu_times_first_gradient():
    path = descend(with_optimizer(learning_rate=0.1, momentum=0.5), np.array([0.0]), np.array([[2.0], [4.0]]))
    assert path[0, 0] == -0.2  # v0 = 0: the first step is plain
    assert path[1, 0] == pytest.approx(-0.2 - 0.1 * (0.5 * 2 + 4), abs=1e-16)


@settings(deadline=None, max_examples=30)
@given(
    rate=st.floats(1e-4, 1),
    momentum=st.floats(0, 0.99),
    dampening=st.floats(0, 1),
    weight_decay=st.floats(0, 0.5),
    nesterov=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sgd_is_torchs_recurrence_for_every_variant(rate, momentum, dampening, weight_decay, nesterov, seed):
    if nesterov or momentum == 0:
        dampening = 0.0
    grads = np.random.default_rng(seed).standard_normal((6, 3))
    options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": weight_decay}
    path = descend(with_optimizer(learning_rate=rate, **options), np.ones(3), grads)
    expected = torch_sgd(np.ones(3), grads, rates=[rate] * 6, **options)
    scale = max(1.0, np.abs(expected).max())
    assert np.abs(path - expected).max() <= 64 * np.finfo(np.float64).eps * scale  # six steps of a few roundings


def test_zero_gradients_coast_on_the_buffer():
    path = descend(with_optimizer(learning_rate=1.0, momentum=0.5), np.array([0.0]), np.array([[8.0], [0.0], [0.0]]))
    assert path.ravel().tolist() == [-8, -12, -14]


def test_adam_is_its_recurrence_with_coupled_decay():
    changed = with_optimizer(
        name="adam", learning_rate=0.1, momentum=None, dampening=None, nesterov=None, betas=(0.9, 0.99), epsilon=1e-3,
        weight_decay=0.2,
    )  # fmt: skip
    grads = np.random.default_rng(0).standard_normal((5, 3))
    parameter, first, second, expected = np.ones(3), np.zeros(3), np.zeros(3), []
    for step, grad in enumerate(grads, start=1):
        decayed = grad + 0.2 * parameter
        first = 0.9 * first + 0.1 * decayed
        second = 0.99 * second + 0.01 * decayed**2
        parameter = parameter - 0.1 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-3)
        expected.append(parameter)
    assert np.abs(descend(changed, np.ones(3), grads) - expected).max() < 1e-14


SCHEDULES = {
    "constant": (Schedule(name="constant"), [0.4, 0.4, 0.4, 0.4]),
    "step": (Schedule(name="step", step_epochs=2, gamma=0.1), [0.4, 0.4, 0.04, 0.04]),
    "cosine": (
        Schedule(name="cosine", final_learning_rate=0.2),
        [0.4, 0.2 + 0.1 * (1 + np.sqrt(0.5)), 0.3, 0.2 + 0.1 * (1 - np.sqrt(0.5))],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_changes_at_the_first_step_of_an_epoch_and_the_first_update_has_the_first_rate(name):
    schedule, rates = SCHEDULES[name]
    changed = dataclasses.replace(with_optimizer(learning_rate=0.4, momentum=0.8), schedule=schedule, epochs=4)
    grads = np.random.default_rng(0).standard_normal((12, 2))
    path = descend(changed, np.zeros(2), grads, steps_per_epoch=3)
    expected = torch_sgd(np.zeros(2), grads, rates=np.repeat(rates, 3), momentum=0.8)
    assert np.abs(path - expected).max() < 1e-14


def test_the_two_weight_surface_is_descended_to_its_minimum_at_1_1():
    def grad_of(w):  # of (2 - w0 - w1)^2 + (4 - 3 w0 - w1)^2
        first, second = 2 - w[0] - w[1], 4 - 3 * w[0] - w[1]
        return np.array([-2 * first - 6 * second, -2 * first - 2 * second])

    with precision_scope("float64"):
        rule = optim.optimizer(with_optimizer(learning_rate=0.02, momentum=0.8), 1)
        weights = jnp.zeros(2)
        state = rule.init(weights)
        for _ in range(600):
            updates, state = rule.update(jnp.asarray(grad_of(np.asarray(weights))), state, weights)
            weights = optax.apply_updates(weights, updates)
    assert np.abs(np.asarray(weights) - 1).max() < 1e-12
