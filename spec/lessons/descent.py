"""Gradient descent on the lesson's surface of two weights, plain and with momentum (S6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spec import oracle
from spec.recipe import Optimizer

MINIMUM = (1.0, 1.0)
HESSIAN = ((20.0, 8.0), (8.0, 4.0))


def surface(weights: Any) -> Any:
    """Return (2 - w1 - w2)^2 + (4 - 3 w1 - w2)^2 for `weights` [..., 2]: shape [...], 0 at (1, 1).

    Arithmetic alone, so the arrays may be NumPy's, JAX's or torch's, and either framework can differentiate it. Its
    second derivatives are `HESSIAN` everywhere.

    >>> surface(np.array([[0.0, 0.0], [1.0, 1.0]])).tolist()
    [20.0, 0.0]
    """
    first, second = weights[..., 0], weights[..., 1]
    return (2 - first - second) ** 2 + (4 - 3 * first - second) ** 2


def surface_gradient(weights: ArrayLike) -> np.ndarray:
    """Return the surface's gradient by hand, float64 [..., 2]: the Hessian times the way from the minimum."""
    return (np.asarray(weights, np.float64) - MINIMUM) @ np.array(HESSIAN)


def plain(rate: float, *, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False) -> Optimizer:
    """Return torch's SGD without weight decay, as a recipe writes it."""
    return Optimizer(
        name="sgd",
        learning_rate=rate,
        weight_decay=0.0,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
    )


def path(
    gradient: Callable[[np.ndarray], np.ndarray], start: ArrayLike, optimizer: Optimizer, *, steps: int
) -> np.ndarray:
    """Return where `optimizer` goes from `start` [n] by `gradient`, in the oracle's float64: [steps + 1, n]."""
    here = {"weights": np.asarray(start, np.float64)}
    state = oracle.initial_opt_state(optimizer, here)
    visited = [here["weights"]]
    for _ in range(steps):
        grads = {"weights": gradient(here["weights"])}
        here, state = oracle.update(optimizer, optimizer.learning_rate, here, grads, state)
        visited.append(here["weights"])
    return np.array(visited)


def largest_stable_rate(curvature: float, *, momentum: float = 0.0) -> float:
    """Return 2 (1 + mu) / lambda: above this rate descent diverges along an eigenvector of that `curvature` lambda > 0.

    Source: Polyak, DOI 10.1016/0041-5553(64)90137-5.
    """
    return 2 * (1 + momentum) / curvature


def shrinkage(rate: float, curvature: float, *, momentum: float = 0.0) -> float:
    """Return by what the distance to the minimum is multiplied in the long run at each step, along one eigenvector.

    Without momentum |1 - lr lambda|; with it the larger root in modulus of z^2 - (1 + mu - lr lambda) z + mu, the
    recurrence of two successive distances. Below 1 the distance shrinks, above 1 descent diverges.

    >>> shrinkage(0.5, 1.0)
    0.5
    """
    return float(np.abs(np.roots([1, -(1 + momentum - rate * curvature), momentum])).max())


def averaged(grads: ArrayLike, *, momentum: float) -> np.ndarray:
    """Return the average v_t = mu v_{t-1} + (1 - mu) g_t from v = 0, for `grads` [steps, n]: [steps, n] (S6.5)."""
    velocity, velocities = np.zeros(np.shape(grads)[1:]), []
    for grad in np.asarray(grads, np.float64):
        velocity = momentum * velocity + (1 - momentum) * grad
        velocities.append(velocity)
    return np.array(velocities)


def buffers(grads: ArrayLike, *, momentum: float, dampening: float = 0.0) -> np.ndarray:
    """Return torch's b_0 = g_0, b_t = mu b_{t-1} + (1 - d) g_t for `grads` [steps, n]: [steps, n] (S6.2, S6.4)."""
    first, *rest = np.asarray(grads, np.float64)
    kept = [first]
    for grad in rest:
        kept.append(momentum * kept[-1] + (1 - dampening) * grad)
    return np.array(kept)


def rate_inside(grads: ArrayLike, rates: Sequence[float], *, momentum: float) -> np.ndarray:
    """Return the textbook's w_t = mu w_{t-1} - lr_t g_t from w = 0, which are the steps themselves: [steps, n] (S6.5).

    torch's step is -lr_t b_t: the same while the rate stays, another one from its first change.
    """
    step, steps = np.zeros(np.shape(grads)[1:]), []
    for rate, grad in zip(rates, np.asarray(grads, np.float64), strict=True):
        step = momentum * step - rate * grad
        steps.append(step)
    return np.array(steps)
