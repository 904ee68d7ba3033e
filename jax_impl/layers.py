"""The layers that Flax or XLA do not have as the specification (S3, S7) and the CPU need them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

TORCH_BATCHNORM_MOMENTUM = 0.1
BATCHNORM_EPSILON = 1e-5

ACTIVATIONS = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}


class BatchNorm(nnx.BatchNorm):
    """BatchNorm over all axes but the last, with torch's running variance.

    A batch is normalised by its biased variance; the running variance takes the unbiased one, v n/(n-1) (S7). Flax's
    update, r' = m r + (1-m) v, takes the biased one; adding (r' - m r)/(n-1) makes it torch's. Running statistics and
    the arithmetic are at least float32.
    """

    def __init__(self, num_features: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(
            num_features,
            momentum=1 - TORCH_BATCHNORM_MOMENTUM,
            epsilon=BATCHNORM_EPSILON,
            use_fast_variance=False,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return `x` [..., num_features] normalised, in its own dtype; in training, update the running statistics."""
        before = self.var[...]
        normalized = super().__call__(x, use_running_average=not train)
        if train:
            count = math.prod(x.shape[:-1])
            self.var[...] += (self.var[...] - self.momentum * before) / (count - 1)
        return normalized.astype(x.dtype)


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Return the maxima of the 2x2 windows of `x` [batch, h, w, c]: [batch, h//2, w//2, c]; an odd edge is left out.

    The gradient goes to the first largest element of a window, row by row, as torch's does (S3). Two selections give
    that rule, and XLA's own gradient of a windowed maximum is many times slower on CPU.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(batch, height // 2, 2, width // 2, 2, channels)
    left, right = x[:, :, :, :, 0], x[:, :, :, :, 1]
    rows = jnp.where(left >= right, left, right)
    top, bottom = rows[:, :, 0], rows[:, :, 1]
    return jnp.where(top >= bottom, top, bottom)


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, *, precision: Any = None, **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated` for stride 1, NHWC and HWIO, with a gradient that XLA compiles well on CPU.

    `nnx.Conv` calls it. XLA:CPU runs the stock kernel gradient inside a loop 10 to 100 times slower than outside; there
    it is written as matrix products. Which one is compiled follows the platform that the program is lowered for.
    """

    def stock(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, precision=precision, **options)

    def cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _conv_with_matmul_gradient(x, kernel)

    plain = tuple(strides) == (1, 1) and x.ndim == 4 and list(padding) == _same_padding(kernel)
    return lax.platform_dependent(x, kernel, cpu=cpu, default=stock) if plain else stock(x, kernel)


def _same_padding(kernel: jax.Array) -> list[tuple[int, int]]:
    return [(size // 2, size // 2) for size in kernel.shape[:2]]


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), _same_padding(kernel), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def _conv_with_matmul_gradient(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _convolve(x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the gradients by `x` (a convolution with the turned kernel) and by `kernel` (a product for each row)."""
    x, kernel = saved
    kernel_height, kernel_width, inputs, outputs = kernel.shape
    turned = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
    _, height, width, _ = x.shape
    (top, bottom), (left, right) = _same_padding(kernel)
    padded = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    columns = jnp.concatenate([padded[:, :, j : j + width] for j in range(kernel_width)], axis=-1)
    flat_grad = grad.reshape(-1, outputs).T
    rows = [flat_grad @ columns[:, i : i + height].reshape(-1, kernel_width * inputs) for i in range(kernel_height)]
    kernel_grad = jnp.stack([row.T.reshape(kernel_width, inputs, outputs) for row in rows])
    return _convolve(grad, turned), kernel_grad


_conv_with_matmul_gradient.defvjp(_forward, _backward)
