"""The networks: forward through named layers, and back through them for the gradients (S3, S5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from spec.oracle import layers
from spec.oracle.losses import loss_gradient
from spec.oracle.sums import FLOAT64, Sums
from spec.recipe import Loss, Model


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What a forward pass gave; arrays are float64 in torch's layouts, images [batch, channels, h, w].

    `activations` holds each layer's output by name, in order; `logits` [batch, outputs] is the last of them.
    `batch_stats` holds every BatchNorm's running statistics after the pass, by leaf name.
    `decisions` holds what each relu (bool, the gate), max-pool (int8, the place in the window) and, in training,
    dropout (bool, the mask) decided. `tape` is the way back for `backward`, empty after evaluation.
    """

    activations: dict[str, np.ndarray]
    logits: np.ndarray
    batch_stats: dict[str, np.ndarray]
    decisions: dict[str, np.ndarray]
    tape: tuple[tuple[str, layers.Back], ...] = field(repr=False)


def layer_names(model: Model) -> tuple[str, ...]:
    """Return the names of the layers in order; a name is its kind and a number. A linear layer flattens its input."""
    return tuple(_cnn_names(model) if model.name == "cnn" else _mlp_names(model))


def forward(
    model: Model,
    state: Mapping[str, ArrayLike],
    inputs: ArrayLike,
    *,
    train: bool,
    decisions: Mapping[str, np.ndarray] | None = None,
    sums: Sums = FLOAT64,
) -> Forward:
    """Return what the network of the canonical `state` makes of `inputs`.

    `inputs` are [batch, h, w, channels] or [batch, features]. `decisions`, by layer name, take the place of what relu,
    max-pool and dropout would decide. In training every dropout needs its mask; in evaluation dropout does nothing.
    `sums` adds up, on the way back too.
    Raises ValueError for a missing mask, a decision of another shape, and one for a layer that decides nothing.
    """
    given = dict(decisions or {})
    names = layer_names(model)
    if unknown := [name for name in given if name not in names or _kind(name) not in ("relu", "pool", "dropout")]:
        raise ValueError(f"decisions name {unknown[0]!r}, which decides nothing; the layers are {', '.join(names)}")
    hidden = _channels_first(inputs)
    activations, batch_stats, decided, tape = {}, {}, {}, []
    for name in names:
        own = _own_leaves(state, name)
        applied = _apply(model, name, own, hidden, sums, train=train, given=given.get(name))
        activations[name] = hidden = applied.output
        batch_stats |= {f"{name}.{leaf}": value for leaf, value in applied.batch_stats.items()}
        if applied.decision is not None:
            decided[name] = applied.decision
        tape.append((name, applied.back))
    return Forward(
        activations=activations,
        logits=hidden,
        batch_stats=batch_stats,
        decisions=decided,
        tape=tuple(tape) if train else (),
    )


def backward(passed: Forward, logits_grad: np.ndarray) -> dict[str, np.ndarray]:
    """Return the gradient by every trained leaf, canonical names and layouts, given that by the logits.

    The chain rule, layer by layer from the last. Raises ValueError after a pass in evaluation.
    """
    if not passed.tape:
        raise ValueError("a forward pass in evaluation has no way back; use train=True")
    grads: dict[str, np.ndarray] = {}
    grad = logits_grad
    for name, back in reversed(passed.tape):
        grad, own = back(grad)
        grads = {f"{name}.{leaf}": value for leaf, value in own.items()} | grads
    return grads


def gradients(
    model: Model,
    loss: Loss,
    state: Mapping[str, ArrayLike],
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    decisions: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Return the gradient of the reduced training loss by every trained leaf of `state`, float64, canonical layouts."""
    passed = forward(model, state, inputs, train=True, decisions=decisions)
    return backward(passed, loss_gradient(passed.logits, labels, loss))


def _mlp_names(model: Model) -> Iterator[str]:
    if model.input_batchnorm:
        yield "norm0"
    for index, activation in enumerate(model.activations or (), start=1):
        yield from (f"linear{index}", f"{activation}{index}")
    yield f"linear{len(model.hidden_sizes) + 1}"


def _cnn_names(model: Model) -> Iterator[str]:
    convolutions = len(model.channels or ())
    for index in range(1, convolutions + 1):
        yield from (f"conv{index}", f"norm{index}", f"relu{index}", f"pool{index}")
    for index in range(1, len(model.hidden_sizes) + 1):
        later = convolutions + index
        yield from (f"linear{index}", f"norm{later}", f"relu{later}", f"dropout{index}")
    yield f"linear{len(model.hidden_sizes) + 1}"


def _channels_first(inputs: ArrayLike) -> np.ndarray:
    inputs = np.asarray(inputs, np.float64)
    return inputs.transpose(0, 3, 1, 2) if inputs.ndim == 4 else inputs  # a flattened image runs channel, row, column


def _kind(name: str) -> str:
    return name.rstrip("0123456789")


def _own_leaves(state: Mapping[str, ArrayLike], name: str) -> dict[str, np.ndarray]:
    prefix = f"{name}."
    return {
        leaf.removeprefix(prefix): np.asarray(value, np.float64)
        for leaf, value in state.items()
        if leaf.startswith(prefix)
    }


def _apply(
    model: Model,
    name: str,
    own: dict[str, np.ndarray],
    x: np.ndarray,
    sums: Sums,
    *,
    train: bool,
    given: np.ndarray | None,
) -> layers.Applied:
    """Return what the layer `name` makes of `x`; `given` is its decision, or None for it to decide."""
    match _kind(name):
        case "linear":
            return layers.linear(x, own["weight"], None if model.bias is False else own["bias"], sums)
        case "conv":
            return layers.convolution(x, own["weight"], own["bias"], sums)
        case "norm":
            return layers.batchnorm(x, **own, sums=sums) if train else layers.batchnorm_by_running(x, **own)
        case "sigmoid":
            return layers.sigmoid(x)
        case "tanh":
            return layers.tanh(x)
        case "relu":
            return layers.relu(x, _shaped(given, name, x.shape))
        case "pool":
            shape = (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
            return layers.max_pool(x, _shaped(given, name, shape))
        case _:
            return _dropout(model.dropout or 0.0, name, x, train=train, mask=_shaped(given, name, x.shape))


def _dropout(rate: float, name: str, x: np.ndarray, *, train: bool, mask: np.ndarray | None) -> layers.Applied:
    if not train:
        return layers.Applied(output=x)
    if mask is None and rate > 0:
        raise ValueError(f"{name} has no mask; in training with dropout {rate} give decisions[{name!r}]")
    return layers.dropout(x, rate, np.ones(x.shape, bool) if mask is None else mask)


def _shaped(given: np.ndarray | None, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    if given is None:
        return None
    given = np.asarray(given)
    if given.shape != shape:
        raise ValueError(f"the decision of {name} has shape {given.shape}; it must have {shape}")
    return given
