"""S4: the losses, by hand and against float64 NumPy; their stability; closed-form gradients (S5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_impl.objective import example_losses, predictions
from jax_impl.trainer import precision_scope
from spec.recipe import Loss

CROSS_ENTROPY = Loss(name="cross_entropy", reduction="mean", label_smoothing=0.0)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def losses(logits, labels, loss=CROSS_ENTROPY) -> np.ndarray:
    with precision_scope("float64"):
        return np.asarray(example_losses(jnp.asarray(logits, jnp.float64), jnp.asarray(labels), loss))


def test_softmax_of_one_to_four_is_the_lessons_and_a_thousand_more_changes_nothing():
    expected = [0.0321, 0.0871, 0.2369, 0.6439]
    for shift in (0.0, 1000.0):
        logits = np.array([[1.0, 2.0, 3.0, 4.0]]) + shift
        found = [np.exp(-losses(logits, [label]))[0] for label in range(4)]
        assert np.abs(np.array(found) - expected).max() < 5e-5


def test_cross_entropy_is_minus_the_natural_log_of_the_softmax_of_each_example():
    logits = np.random.default_rng(0).standard_normal((5, 3))
    labels = np.array([0, 2, 1, 1, 0])
    found = losses(logits, labels)
    assert found.shape == (5,)  # one an example, not [batch, classes]
    assert np.abs(found + np.log(softmax(logits)[np.arange(5), labels])).max() < 1e-15


def test_the_lessons_slip_applies_softmax_twice():
    loss = Loss(name="cross_entropy_of_softmax", reduction="mean", label_smoothing=0.0)
    logits = np.random.default_rng(0).standard_normal((5, 3)) * 4
    labels = np.array([0, 2, 1, 1, 0])
    expected = -np.log(softmax(softmax(logits))[np.arange(5), labels])
    assert np.abs(losses(logits, labels, loss) - expected).max() < 1e-15


def test_label_smoothing_spreads_e_over_all_classes():
    loss = Loss(name="cross_entropy", reduction="mean", label_smoothing=0.3)
    logits = np.random.default_rng(0).standard_normal((4, 3))
    targets = np.full((4, 3), 0.1)  # 0.3 / 3
    targets[np.arange(4), [0, 1, 2, 0]] += 0.7
    expected = -(targets * np.log(softmax(logits))).sum(axis=1)
    assert np.abs(losses(logits, [0, 1, 2, 0], loss) - expected).max() < 1e-15


def test_binary_cross_entropy_is_stable_and_its_gradient_is_sigma_minus_y():
    loss = Loss(name="binary_cross_entropy", reduction="mean", label_smoothing=0.0)
    logits = np.array([[-800.0], [-1.0], [0.0], [2.0], [800.0]])
    labels = np.array([1, 0, 1, 1, 0])
    expected = np.array([800, np.log1p(np.exp(-1)), np.log(2), np.log1p(np.exp(-2)), 800])
    assert np.abs(losses(logits, labels, loss) - expected).max() < 1e-12
    with precision_scope("float64"):
        grad = jax.grad(lambda z: example_losses(z, jnp.asarray(labels), loss).sum())(jnp.asarray(logits))
    sigma = np.array([0, 1 / (1 + np.e), 0.5, 1 / (1 + np.exp(-2)), 1])
    assert np.abs(np.asarray(grad)[:, 0] - (sigma - labels)).max() < 1e-15


def test_the_gradient_of_cross_entropy_is_softmax_minus_one_hot():
    logits = np.random.default_rng(0).standard_normal((5, 3))
    labels = np.array([0, 2, 1, 1, 0])
    with precision_scope("float64"):
        grad = jax.grad(lambda z: example_losses(z, jnp.asarray(labels), CROSS_ENTROPY).mean())(jnp.asarray(logits))
    assert np.abs(np.asarray(grad) - (softmax(logits) - np.eye(3)[labels]) / 5).max() < 1e-16


@pytest.mark.parametrize(
    ("logits", "expected"), [([[1, 3, 2], [5, 5, 1]], [1, 0]), ([[-0.1], [0.0], [0.1]], [0, 0, 1])]
)
def test_the_prediction_is_the_largest_logit_the_first_of_equals(logits, expected):
    assert predictions(jnp.asarray(logits, jnp.float32)).tolist() == expected
