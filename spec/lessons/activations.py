"""The lessons' activations with their derivatives, and how gradients fade through many layers of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from spec import oracle
from spec.params import initial_state, leaves
from spec.recipe import Init, Loss, Model

LEAK = 0.01  # torch's default slope of leaky relu below 0


class Activation(NamedTuple):
    """A function of each element, and its derivative as one of the same input."""

    value: Callable[[np.ndarray], np.ndarray]
    derivative: Callable[[np.ndarray], np.ndarray]


def _sigmoid_derivative(x: np.ndarray) -> np.ndarray:
    return oracle.sigmoid(x) * oracle.sigmoid(-x)  # 1 - s(x) = s(-x), without the cancellation


ACTIVATIONS = {
    "sigmoid": Activation(oracle.sigmoid, _sigmoid_derivative),
    "tanh": Activation(np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "relu": Activation(lambda x: np.where(x > 0, x, 0.0), lambda x: np.where(x > 0, 1.0, 0.0)),
    "leaky relu": Activation(lambda x: np.where(x > 0, x, LEAK * x), lambda x: np.where(x > 0, 1.0, LEAK)),
}


def softmax_jacobian(logits: ArrayLike) -> np.ndarray:
    """Return dp_i / dz_j = p_i ((i = j) - p_j) of p = softmax(z), for `logits` [classes]: [classes, classes].

    Its rows sum to 0, for adding one number to every logit changes nothing.
    """
    p = oracle.softmax(logits)
    return np.diag(p) - np.outer(p, p)


def derivative_products(kind: str, depths: ArrayLike) -> np.ndarray:
    """Return the most that the derivatives of so many layers of one activation can multiply to: f'_max ** depth.

    The largest derivative is sought over [-5, 5] in steps of 1/100.
    """
    largest = ACTIVATIONS[kind].derivative(np.arange(-500, 501) / 100).max()
    return largest ** np.asarray(depths, np.float64)


def gradient_sizes(kind: str, *, layers: int, width: int, examples: int, seed: int) -> np.ndarray:
    """Return the root mean square of each layer's weight gradient at torch's initial weights, first layer first.

    The net has `layers` hidden layers of `width` units with the activation `kind` (sigmoid, tanh or relu), 10 classes
    and the mean cross-entropy; inputs are normal, labels drawn, all of `seed`: [layers + 1].
    """
    model = Model(
        name="mlp", hidden_sizes=(width,) * layers, activations=(kind,) * layers, bias=True, input_batchnorm=False
    )
    init = Init(weight="uniform_fan_in", bias="uniform_fan_in")
    state = initial_state(leaves(model, (width,), 10), init, seed)
    generator = np.random.default_rng(seed)
    inputs, labels = generator.standard_normal((examples, width)), generator.integers(0, 10, examples)
    objective = Loss(name="cross_entropy", reduction="mean", label_smoothing=0.0)
    grads = oracle.gradients(model, objective, state, inputs, labels)
    return np.array([np.sqrt(np.mean(grads[f"linear{layer}.weight"] ** 2)) for layer in range(1, layers + 2)])
