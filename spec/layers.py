"""The layers of a recipe's network, one by one: names, output shapes, arrays, costs (S3). No framework is needed.

Names are those of `spec.params`, and of the torch module's children. Shapes are without the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from spec import flops, params
from spec.datasets.sizes import Size
from spec.params import KERNEL_SIZE, Leaf
from spec.recipe import Model, Recipe

FLAX_NAMES = {
    "weight": "kernel",
    "bias": "bias",
    "scale": "scale",
    "shift": "bias",
    "running_mean": "mean",
    "running_var": "var",
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer, or the input, which is the first: what it gives and what it costs.

    `shape` is its output's in JAX, channels last; `leaves` are its arrays, `flops` the operations of its product for
    one example, forward (None: it has no product).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    leaves: tuple[Leaf, ...] = ()
    flops: int | None = None
    flattens: bool = False

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Return the output's shape in torch, channels first; flat where the layer flattens there and not in JAX."""
        if self.flattens:
            return (math.prod(self.shape),)
        return (self.shape[-1], *self.shape[:-1]) if len(self.shape) == 3 else self.shape

    @property
    def num_parameters(self) -> int:
        """Return how many numbers of it are trained."""
        return params.num_parameters(self.leaves)


def layers(recipe: Recipe, size: Size) -> tuple[Layer, ...]:
    """Return the input and the layers of the network, in order, for data of that size.

    Raises RecipeError when the model cannot take such examples.
    """
    model, outputs = recipe.model, params.num_outputs(recipe, size.num_classes)
    listed = params.leaves(model, size.input_shape, outputs)
    products = iter(flops.forward_flops(model, size.input_shape, outputs))
    found = [Layer(name="input", kind="input", shape=size.input_shape)]
    for name, kind in _names(model):
        own = tuple(leaf for leaf in listed if leaf.name.split(".")[0] == name)
        weighted = kind == "linear" or kind.startswith("conv")
        found.append(
            Layer(
                name=name,
                kind=kind,
                shape=_shape(kind, found[-1].shape, own),
                leaves=own,
                flops=next(products) if weighted else None,
                flattens=name == "norm0",
            )
        )
    return tuple(found)


def flax_array(leaf: Leaf) -> tuple[str, tuple[int, ...]]:
    """Return name and shape of an array in Flax: a linear kernel is [in, out], a convolution's [h, w, in, out]."""
    outputs, *inputs = leaf.shape
    if leaf.role != "weight":
        shape: tuple[int, ...] = leaf.shape
    elif len(leaf.shape) == 4:
        shape = (*inputs[1:], inputs[0], outputs)
    else:
        shape = (*inputs, outputs)
    return FLAX_NAMES[leaf.role], shape


def _names(model: Model) -> Iterator[tuple[str, str]]:
    """Yield name and kind of each layer, in order."""
    return _cnn_names(model) if model.name == "cnn" else _mlp_names(model)


def _mlp_names(model: Model) -> Iterator[tuple[str, str]]:
    if model.input_batchnorm:
        yield "norm0", "BatchNorm"
    yield "flatten", "flatten"
    for index, activation in enumerate(model.activations or (), start=1):
        yield f"linear{index}", "linear"
        yield f"{activation}{index}", activation
    yield f"linear{len(model.hidden_sizes) + 1}", "linear"


def _cnn_names(model: Model) -> Iterator[tuple[str, str]]:
    convs, hidden = len(model.channels or ()), len(model.hidden_sizes)
    for index in range(1, convs + 1):
        yield f"conv{index}", f"conv {KERNEL_SIZE}x{KERNEL_SIZE}"
        yield f"norm{index}", "BatchNorm"
        yield f"relu{index}", "relu"
        yield f"pool{index}", "max-pool 2x2"
    yield "flatten", "flatten"
    for index in range(1, hidden + 1):
        yield f"linear{index}", "linear"
        yield f"norm{convs + index}", "BatchNorm"
        yield f"relu{convs + index}", "relu"
        yield f"dropout{index}", f"dropout {model.dropout:g}"
    yield f"linear{hidden + 1}", "linear"


def _shape(kind: str, before: tuple[int, ...], leaves: tuple[Leaf, ...]) -> tuple[int, ...]:
    """Return the output's shape of a layer of that kind with those arrays, `before` being its input's."""
    if kind == "flatten":
        return (math.prod(before),)
    if kind.startswith("max-pool"):
        return (before[0] // 2, before[1] // 2, before[2])
    if kind == "linear" or kind.startswith("conv"):
        return (*before[:-1], leaves[0].shape[0])
    return before
