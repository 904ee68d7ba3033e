"""The update rules and schedules, in torch's form (S6)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from spec.recipe import Optimizer, Recipe

State = dict[str, np.ndarray]


def initial_opt_state(optimizer: Optimizer, params: Mapping[str, ArrayLike]) -> State:
    """Return the optimiser's state before the first update: `step` 0 and a buffer of zeros, float64, for each leaf.

    The buffers are `momentum_buffer.<leaf>` for sgd, none at momentum 0, and `exp_avg.<leaf>` and `exp_avg_sq.<leaf>`
    for adam; `params` holds the trained leaves alone.
    """
    if optimizer.name == "adam":
        kinds = ("exp_avg", "exp_avg_sq")
    else:
        kinds = ("momentum_buffer",) if optimizer.momentum else ()
    zeros = {f"{kind}.{name}": np.zeros(np.shape(value)) for kind in kinds for name, value in params.items()}
    return {"step": np.array(0, np.int64), **zeros}


def update(
    optimizer: Optimizer,
    learning_rate: float,
    params: Mapping[str, ArrayLike],
    grads: Mapping[str, ArrayLike],
    opt_state: Mapping[str, ArrayLike],
) -> tuple[State, State]:
    """Return the parameters and the optimiser's state after one update, float64; nothing given is changed.

    With g = grad + wd p, the decay coupled. sgd: b_1 = g_1, undamped, then b_t = mu b_{t-1} + (1-d) g_t;
    p -= lr (g_t + mu b_t if nesterov else b_t). adam: m_t = b1 m_{t-1} + (1-b1) g_t, v_t = b2 v_{t-1} + (1-b2) g_t^2,
    p -= lr (m_t / (1 - b1^t)) / (sqrt(v_t / (1 - b2^t)) + eps). Raises ValueError unless each parameter has a gradient.
    Source: Kingma and Ba, arXiv 1412.6980.
    """
    if params.keys() != grads.keys():
        raise ValueError(f"parameters {sorted(params)} and gradients {sorted(grads)} must have the same names")
    step = int(opt_state["step"]) + 1
    moved: State = {}
    buffers: State = {"step": np.array(step, np.int64)}
    for name, value in params.items():
        parameter = np.asarray(value, np.float64)
        grad = np.asarray(grads[name], np.float64) + optimizer.weight_decay * parameter
        rule = _adam if optimizer.name == "adam" else _sgd
        direction, kept = rule(optimizer, grad, name, opt_state, step)
        moved[name] = parameter - learning_rate * direction
        buffers |= kept
    return moved, buffers


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """Return the learning rate of `epoch`, from 1; the first epoch's is the recipe's own, r.

    constant: r; step: r gamma^floor((epoch-1) / step_epochs); cosine: f + (r - f) (1 + cos(pi (epoch-1) / epochs)) / 2
    with f the final one, reached after the last epoch.
    """
    rate, schedule, elapsed = recipe.optimizer.learning_rate, recipe.schedule, epoch - 1
    if schedule.name == "step":
        return rate * schedule.gamma ** (elapsed // schedule.step_epochs)
    if schedule.name == "cosine":
        final = schedule.final_learning_rate
        return final + (rate - final) * (1 + math.cos(math.pi * elapsed / recipe.epochs)) / 2
    return rate


def _sgd(
    optimizer: Optimizer, grad: np.ndarray, name: str, opt_state: Mapping[str, ArrayLike], step: int
) -> tuple[np.ndarray, State]:
    if not optimizer.momentum:
        return grad, {}
    key = f"momentum_buffer.{name}"
    buffer = grad
    if step > 1:
        buffer = optimizer.momentum * np.asarray(opt_state[key], np.float64) + (1 - optimizer.dampening) * grad
    return (grad + optimizer.momentum * buffer if optimizer.nesterov else buffer), {key: buffer}


def _adam(
    optimizer: Optimizer, grad: np.ndarray, name: str, opt_state: Mapping[str, ArrayLike], step: int
) -> tuple[np.ndarray, State]:
    first_key, second_key = f"exp_avg.{name}", f"exp_avg_sq.{name}"
    decay1, decay2 = optimizer.betas
    first = decay1 * np.asarray(opt_state[first_key], np.float64) + (1 - decay1) * grad
    second = decay2 * np.asarray(opt_state[second_key], np.float64) + (1 - decay2) * grad**2
    root = np.sqrt(second / (1 - decay2**step))
    return first / (1 - decay1**step) / (root + optimizer.epsilon), {first_key: first, second_key: second}
