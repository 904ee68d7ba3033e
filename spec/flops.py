"""Floating-point operations of a training step, counted by hand: those of the products, two for each multiply-add."""

from __future__ import annotations

import math

from spec.params import leaves
from spec.recipe import Model


def training_flops(model: Model, input_shape: tuple[int, ...], outputs: int) -> int:
    """Return the operations of the products that training on one example needs: forward, and back by weight and input.

    A product of [1, k] by [k, n] is 2 k n forward, as many for the weight's gradient and for the input's. The first
    product's input has no gradient, unless a norm is before it, whose scale and shift are trained. Adding biases,
    activations, normalisation, pooling and the update do not count.

    >>> from spec import recipe
    >>> training_flops(recipe.load("softmax-regression").model, (28, 28, 1), 10)
    31360
    """
    first, *others = forward_flops(model, input_shape, outputs)
    return (3 if model.input_batchnorm else 2) * first + 3 * sum(others)


def forward_flops(model: Model, input_shape: tuple[int, ...], outputs: int) -> list[int]:
    """Return the operations of each layer's product for one example, first layer first.

    A convolution of [h, w, c] to o channels is 2 * 9 * c * o for each of its h * w outputs, those over padding too.
    """
    weights = [leaf for leaf in leaves(model, input_shape, outputs) if leaf.role == "weight"]
    convs = len(model.channels) if model.name == "cnn" else 0
    pixels = [math.prod(size >> index for size in input_shape[:2]) for index in range(convs)]
    counts = [2 * math.prod(leaf.shape) for leaf in weights]
    return [count * size for count, size in zip(counts, pixels + [1] * (len(counts) - convs), strict=True)]
