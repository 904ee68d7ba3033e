"""The layers that Flax or XLA do not have as the specification (S3, S7) and the CPU need them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

TORCH_BATCHNORM_MOMENTUM = 0.1
BATCHNORM_EPSILON = 1e-5

ACTIVATIONS = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}


class BatchNorm(nnx.Module):
    """BatchNorm over all axes but the last, with torch's running variance.

    A batch is normalised by its biased variance v = mean((x - mean(x))^2), the running variance takes the unbiased one,
    v n/(n-1) (S7); Flax's own layer takes the biased one for both. Statistics and arithmetic are at least float32.
    """

    def __init__(self, num_features: int) -> None:
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))

    def __call__(self, x: Float[Array, "*axes features"], *, train: bool) -> Float[Array, "*axes features"]:
        """Return `x` [..., num_features] normalised, in its own dtype; in training, update the running statistics."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale, bias = (leaf[...].astype(wide.dtype) for leaf in (self.scale, self.bias))
        if train:
            normalized, mean, var = normalize_batch(wide, scale, bias)
            count = math.prod(x.shape[:-1])
            self.mean[...] = _run(self.mean[...], mean)
            self.var[...] = _run(self.var[...], var * (count / (count - 1)))
        else:
            inverse = lax.rsqrt(self.var[...] + BATCHNORM_EPSILON)
            normalized = (wide - self.mean[...]) * (inverse * scale) + bias
        return normalized.astype(x.dtype)


def _run(running: jax.Array, value: jax.Array) -> jax.Array:
    return (1 - TORCH_BATCHNORM_MOMENTUM) * running + TORCH_BATCHNORM_MOMENTUM * value


@jax.custom_vjp
def normalize_batch(
    x: Float[Array, "*axes features"], scale: Float[Array, " features"], bias: Float[Array, " features"]
) -> tuple[Float[Array, "*axes features"], Float[Array, " features"], Float[Array, " features"]]:
    """Return y = scale h + bias with h = (x - mean) / sqrt(var + eps), and the batch's mean and biased variance.

    `x` is [..., features], the others [features]. The gradient is the closed form, half the passes over `x` that
    tracing the forward pass gives: dx = scale / sqrt(var + eps) (g - mean(g) - h mean(g h)), dscale = sum(g h),
    dbias = sum(g). No gradient flows from mean and variance. Source: Ioffe and Szegedy, arXiv 1502.03167.
    """
    return _normalize_forward(x, scale, bias)[0]


def _normalize_forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[tuple, tuple]:
    flat = x.reshape(-1, x.shape[-1])
    mean = flat.mean(axis=0)
    var = jnp.square(flat - mean).mean(axis=0)
    inverse = lax.rsqrt(var + BATCHNORM_EPSILON)
    normalized = (flat - mean) * (inverse * scale) + bias
    return (normalized.reshape(x.shape), mean, var), (flat, mean, inverse, scale)


def _normalize_backward(saved: tuple, grads: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    flat, mean, inverse, scale = saved
    grad = grads[0].reshape(flat.shape)
    hidden = (flat - mean) * inverse
    bias_grad = grad.sum(axis=0)
    scale_grad = (grad * hidden).sum(axis=0)
    count = flat.shape[0]
    x_grad = (scale * inverse) * (grad - bias_grad / count - hidden * (scale_grad / count))
    return x_grad.reshape(grads[0].shape), scale_grad, bias_grad


normalize_batch.defvjp(_normalize_forward, _normalize_backward)


def max_pool_2x2(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch h//2 w//2 channels"]:
    """Return the maxima of the 2x2 windows of `x` [batch, h, w, c]: [batch, h//2, w//2, c]; an odd edge is left out.

    The gradient goes to the first largest element of a window, row by row, as torch's does (S3). Two selections give
    that rule, and XLA's own gradient of a windowed maximum is many times slower on CPU.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(batch, height // 2, 2, width // 2, 2, channels)
    left, right = x[:, :, :, :, 0], x[:, :, :, :, 1]
    rows = _first_maximum(left, right)
    return _first_maximum(rows[:, :, 0], rows[:, :, 1])


def _first_maximum(first: jax.Array, second: jax.Array) -> jax.Array:
    """Return the larger elements, the first of equals, and nan where either is."""
    return jnp.where((second > first) | jnp.isnan(second), second, first)


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
