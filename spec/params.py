"""Canonical parameter names and layouts, and the initial state drawn from (seed, name) (S3).

Names and layouts are those of a torch `state_dict`: a linear weight is [out, in], a convolution [out, in, h, w], and a
flattened image runs channel, row, column. A state is a flat dict from name to array; parameters and BatchNorm's
running statistics (`*.running_mean`, `*.running_var`) stand in it together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spec.errors import RecipeError, StateError, did_you_mean
from spec.recipe import Init, Model, Optimizer, Recipe

MAX_PARAMETERS = 100_000_000
KERNEL_SIZE = 3

Role = Literal["weight", "bias", "scale", "shift", "running_mean", "running_var"]


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of the state: its name, shape, what it is, and the inputs that one of its outputs sums over.

    `flattened` is the [height, width, channels] that a linear weight's inputs were, right after a flatten.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    fan_in: int
    flattened: tuple[int, int, int] | None = None

    @property
    def trained(self) -> bool:
        """Say whether the optimiser changes it."""
        return self.role not in ("running_mean", "running_var")


def num_outputs(recipe: Recipe, num_classes: int) -> int:
    """Return the width of the last layer: the classes, or 1 logit for binary cross-entropy."""
    if recipe.loss.name != "binary_cross_entropy":
        return num_classes
    if num_classes != 2:
        raise RecipeError(f"loss.name binary_cross_entropy needs 2 classes; {recipe.data.name} has {num_classes}")
    return 1


def leaves(model: Model, input_shape: tuple[int, ...], outputs: int) -> tuple[Leaf, ...]:
    """Return the state's leaves in order, for examples of `input_shape`: [features] or [height, width, channels].

    Raises RecipeError when the model cannot take such examples, or has over `MAX_PARAMETERS` parameters.
    """
    if model.name == "cnn":
        listed = tuple(_cnn_leaves(model, input_shape, outputs))
    else:
        listed = tuple(_mlp_leaves(model, input_shape, outputs))
    total = num_parameters(listed)
    if total > MAX_PARAMETERS:
        raise RecipeError(
            f"model.hidden_sizes {list(model.hidden_sizes)} give {total:,} parameters; the limit is "
            f"{MAX_PARAMETERS:,}; use smaller layers"
        )
    return listed


def num_parameters(listed: tuple[Leaf, ...]) -> int:
    """Return how many numbers are trained."""
    return sum(math.prod(leaf.shape) for leaf in listed if leaf.trained)


def state_shapes(listed: Iterable[Leaf]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every leaf by name: parameters and running statistics."""
    return {leaf.name: leaf.shape for leaf in listed}


def optimizer_shapes(listed: Iterable[Leaf], optimizer: Optimizer) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the optimiser's canonical state (S6): `step`, the updates made so far, and the buffers
    `momentum_buffer.NAME` (sgd with momentum) or `exp_avg.NAME` and `exp_avg_sq.NAME` (adam) of every trained leaf."""
    if optimizer.name == "adam":
        kinds: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    else:
        kinds = ("momentum_buffer",) if optimizer.momentum else ()
    buffers = {f"{kind}.{leaf.name}": leaf.shape for kind in kinds for leaf in listed if leaf.trained}
    return {"step": (), **buffers}


def mismatches(found: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return what keeps `found` from having exactly these names and shapes, all numbers finite; a line each."""
    mistakes = [f"{name} is missing; it has shape {list(shape)}" for name, shape in shapes.items() if name not in found]
    for name, value in found.items():
        array = np.asarray(value)
        if name not in shapes:
            mistakes.append(f"{name} is not one of its arrays{did_you_mean(name, shapes)}")
        elif array.shape != shapes[name]:
            mistakes.append(f"{name} has shape {list(array.shape)}; it must have {list(shapes[name])}")
        elif not np.issubdtype(array.dtype, np.number):
            mistakes.append(f"{name} holds {array.dtype}; it must hold numbers")
        elif bad := int(np.count_nonzero(~np.isfinite(array))):
            mistakes.append(f"{name} holds {bad} of {array.size} numbers that are not finite")
    return mistakes


def check_arrays(found: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], *, what: str) -> None:
    """Raise StateError, listing every mismatch, unless `found` has exactly these names and shapes, all finite."""
    _refuse(mismatches(found, shapes), what)


def check_states(
    state: Mapping[str, np.ndarray], opt_state: Mapping[str, np.ndarray], listed: Iterable[Leaf], optimizer: Optimizer
) -> None:
    """Raise StateError, listing every mismatch of both, unless they are a network's and its optimiser's states."""
    listed = tuple(listed)
    mistakes = mismatches(state, state_shapes(listed)) + mismatches(opt_state, optimizer_shapes(listed, optimizer))
    step = np.asarray(opt_state.get("step", 0))
    if step.shape == () and not (step >= 0 and step == step // 1):
        mistakes.append(f"step is {step}; it counts updates, so it must be a whole number, 0 or more")
    _refuse(mistakes, "the state, or the optimiser's,")


def _refuse(mistakes: list[str], what: str) -> None:
    if mistakes:
        raise StateError(f"{what} does not fit:\n" + "\n".join(f"  {mistake}" for mistake in mistakes))


def initial_state(listed: tuple[Leaf, ...], init: Init, seed: int) -> dict[str, np.ndarray]:
    """Return the initial state, float32, each leaf drawn from `default_rng([seed, *name's bytes])`.

    Uniform draws are U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weight and bias, torch's default for Linear and Conv.
    A leaf's values depend on its own name and shape alone, so adding a layer leaves the others as they were.
    """
    return {leaf.name: _draw(leaf, init, seed) for leaf in listed}


def _draw(leaf: Leaf, init: Init, seed: int) -> np.ndarray:
    constant = {"scale": 1.0, "running_var": 1.0, "shift": 0.0, "running_mean": 0.0}.get(leaf.role)
    if constant is not None:
        return np.full(leaf.shape, constant, np.float32)
    name = init.weight if leaf.role == "weight" else init.bias
    generator = np.random.default_rng([seed, *leaf.name.encode()])
    if name == "uniform_fan_in":
        bound = 1 / math.sqrt(leaf.fan_in)
        return generator.uniform(-bound, bound, leaf.shape).astype(np.float32)
    if name == "normal":
        return (init.std * generator.standard_normal(leaf.shape)).astype(np.float32)
    return np.zeros(leaf.shape, np.float32)


def _linear(name: str, inputs: int, outputs: int, *, bias: bool, flattened: tuple[int, ...] = ()) -> Iterator[Leaf]:
    image = (flattened[0], flattened[1], flattened[2]) if len(flattened) == 3 else None
    yield Leaf(name=f"{name}.weight", shape=(outputs, inputs), role="weight", fan_in=inputs, flattened=image)
    if bias:
        yield Leaf(name=f"{name}.bias", shape=(outputs,), role="bias", fan_in=inputs)


def _batchnorm(name: str, channels: int) -> Iterator[Leaf]:
    roles: dict[str, Role] = {
        "weight": "scale",
        "bias": "shift",
        "running_mean": "running_mean",
        "running_var": "running_var",
    }
    for suffix, role in roles.items():
        yield Leaf(name=f"{name}.{suffix}", shape=(channels,), role=role, fan_in=channels)


def _mlp_leaves(model: Model, input_shape: tuple[int, ...], outputs: int) -> Iterator[Leaf]:
    if model.input_batchnorm:
        yield from _batchnorm("norm0", 1)
    sizes = (math.prod(input_shape), *model.hidden_sizes, outputs)
    for index, (inputs, units) in enumerate(itertools.pairwise(sizes), start=1):
        flattened = input_shape if index == 1 else ()
        yield from _linear(f"linear{index}", inputs, units, bias=bool(model.bias), flattened=flattened)


def _cnn_leaves(model: Model, input_shape: tuple[int, ...], outputs: int) -> Iterator[Leaf]:
    channels = model.channels or ()
    if len(input_shape) != 3 or min(input_shape[:2]) >> len(channels) == 0:
        raise RecipeError(
            f"model.name cnn with {len(channels)} channels needs images of at least {2 ** len(channels)}x"
            f"{2 ** len(channels)}, channels last; these examples have shape {list(input_shape)}; move the channels to "
            "the end, use mlp, or state fewer model.channels"
        )
    height, width, inputs = input_shape
    for index, outs in enumerate(channels, start=1):
        fan_in = inputs * KERNEL_SIZE**2
        shape = (outs, inputs, KERNEL_SIZE, KERNEL_SIZE)
        yield Leaf(name=f"conv{index}.weight", shape=shape, role="weight", fan_in=fan_in)
        yield Leaf(name=f"conv{index}.bias", shape=(outs,), role="bias", fan_in=fan_in)
        yield from _batchnorm(f"norm{index}", outs)
        height, width, inputs = height // 2, width // 2, outs
    sizes = (height * width * inputs, *model.hidden_sizes, outputs)
    for index, (ins, units) in enumerate(itertools.pairwise(sizes), start=1):
        flattened = (height, width, inputs) if index == 1 else ()
        yield from _linear(f"linear{index}", ins, units, bias=True, flattened=flattened)
        if index <= len(model.hidden_sizes):
            yield from _batchnorm(f"norm{len(channels) + index}", units)
