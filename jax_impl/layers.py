"""The layers that Flax or XLA do not have as the specification (S3, S7) and the CPU need them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Key

from jax_impl.parallel import WHOLE, Part

TORCH_BATCHNORM_MOMENTUM = 0.1
BATCHNORM_EPSILON = 1e-5
PLAIN_OPTIONS = ("lhs_dilation", "rhs_dilation", "feature_group_count", "batch_group_count")

ACTIVATIONS = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}


class BatchNorm(nnx.Module):
    """BatchNorm over all axes but the last, with torch's running variance.

    A batch is normalised by its biased variance v = mean((x - mean(x))^2), the running variance takes the unbiased one,
    v n/(n-1) (S7); Flax's own layer takes the biased one for both. Statistics and arithmetic are at least float32.
    With `local`, every one of several devices normalises its own rows, and the first one's statistics run (S11).
    """

    def __init__(self, num_features: int, *, local: bool = False) -> None:
        self.local = local
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))

    def __call__(
        self, x: Float[Array, "*axes features"], *, train: bool, part: Part = WHOLE
    ) -> Float[Array, "*axes features"]:
        """Return `x` [..., num_features] normalised, in its own dtype; in training, update the running statistics.

        `part` says which rows of the batch `x` has; unless local, the statistics are those of the whole batch (S11).
        """
        if train:
            return self._by_batch(normalize_batch, x, part)
        wide, scale, bias = self._widened(x)
        inverse = lax.rsqrt(self.var[...] + BATCHNORM_EPSILON)
        return ((wide - self.mean[...]) * (inverse * scale) + bias).astype(x.dtype)

    def relu_pool(
        self, x: Float[Array, "batch h w features"], *, part: Part = WHOLE
    ) -> Float[Array, "batch h//2 w//2 features"]:
        """Return max_pool_2x2(relu(self(x, train=True))) in fewer passes over `x` (`normalize_relu_pool`)."""
        return self._by_batch(normalize_relu_pool, x, part)

    def _by_batch(
        self, normalize: Callable[..., tuple[jax.Array, jax.Array, jax.Array]], x: jax.Array, part: Part
    ) -> jax.Array:
        def unbiased(*given: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            normalized, mean, var = normalize(*given)
            count = _count(given[0], given[-1])
            return normalized, (mean, var * (count / (count - 1)))

        widened = self._widened(x)
        normalized, (mean, var) = part.each(unbiased)(*widened) if self.local else unbiased(*widened, part)
        self.mean[...] = _run(self.mean[...], mean)
        self.var[...] = _run(self.var[...], var)
        return normalized.astype(x.dtype)

    def _widened(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return x.astype(dtype), self.scale[...].astype(dtype), self.bias[...].astype(dtype)


def _run(running: jax.Array, value: jax.Array) -> jax.Array:
    return (1 - TORCH_BATCHNORM_MOMENTUM) * running + TORCH_BATCHNORM_MOMENTUM * value


class Dropout(nnx.Module):
    """Dropout whose mask is that of the whole batch, of which a `Part` takes its rows; the bits of Flax's own layer."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, x: Float[Array, "*axes"], *, key: Key[Array, ""], part: Part = WHOLE) -> Float[Array, "*axes"]:
        """Return `x` [batch, ...] with units dropped with probability `rate`, others divided by 1 - rate (S7)."""
        if self.rate == 0:
            return x
        if self.rate == 1:
            return jnp.zeros_like(x)  # 0 / 0 would have a gradient of nan
        kept = 1.0 - self.rate
        mask = part.rows(jax.random.bernoulli(key, kept, (part.count(x.shape[0]), *x.shape[1:])))
        return lax.select(mask, x / kept, jnp.zeros_like(x))


def _count(x: jax.Array, part: Part) -> int:
    """Return how many values of a channel the whole batch has, of whose rows `x` [rows, ..., channels] are some."""
    return part.count(x.shape[0]) * math.prod(x.shape[1:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_batch(
    x: Float[Array, "*axes features"],
    scale: Float[Array, " features"],
    bias: Float[Array, " features"],
    part: Part = WHOLE,
) -> tuple[Float[Array, "*axes features"], Float[Array, " features"], Float[Array, " features"]]:
    """Return y = scale h + bias with h = (x - mean) / sqrt(var + eps), and the batch's mean and biased variance.

    `x` is [..., features], the others [features]. The gradient is the closed form, half the passes over `x` that
    tracing the forward pass gives: dx = scale / sqrt(var + eps) (g - mean(g) - h mean(g h)), dscale = sum(g h),
    dbias = sum(g). No gradient flows from mean and variance. Of a `part` of the batch, all means are over the whole of
    it, dscale and dbias over the part's own rows. Source: Ioffe and Szegedy, arXiv 1502.03167.
    """
    return _normalize_forward(x, scale, bias, part)[0]


def _normalize_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, part: Part) -> tuple[tuple, tuple]:
    mean, var, inverse = _statistics(x, part)
    return ((x - mean) * (inverse * scale) + bias, mean, var), (x, mean, inverse, scale)


def _normalize_backward(part: Part, saved: tuple, grads: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale = saved
    grad, axes = grads[0], tuple(range(x.ndim - 1))
    hidden = (x - mean) * inverse
    bias_grad, scale_grad = grad.sum(axes), (grad * hidden).sum(axes)
    shift, slope = _of_batch((bias_grad, scale_grad), x, part)
    x_grad = (scale * inverse) * (grad - _weighed(shift + hidden * slope, part))
    return x_grad, scale_grad, bias_grad


def _of_batch(sums: tuple[jax.Array, ...], x: jax.Array, part: Part) -> tuple[jax.Array, ...]:
    """Return the means over the whole batch, filled up, of what was summed over the rows of `x`."""
    count = math.prod(x.shape[:-1])
    return part.mean(tuple(total / count for total in sums))


def _weighed(x: jax.Array, part: Part) -> jax.Array:
    """Return `x` [rows, ...], its rows times their weights."""
    weights = part.weights(x.dtype)
    return x if weights is None else x * weights.reshape(-1, *(1,) * (x.ndim - 1))


def _statistics(x: jax.Array, part: Part) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return mean, biased variance and 1 / sqrt(var + eps) over all axes but the last: [features] each."""

    def mean_of(values: jax.Array) -> jax.Array:
        return part.mean(_weighed(values, part).reshape(-1, x.shape[-1]).mean(axis=0))

    mean = mean_of(x)
    var = mean_of(jnp.square(x - mean))
    return mean, var, lax.rsqrt(var + BATCHNORM_EPSILON)


normalize_batch.defvjp(_normalize_forward, _normalize_backward)


def max_pool_2x2(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch h//2 w//2 channels"]:
    """Return the maxima of the 2x2 windows of `x` [batch, h, w, c]: [batch, h//2, w//2, c]; an odd edge is left out.

    The gradient goes to the first largest element of a window, row by row, as torch's does (S3). Selections give that
    rule, and XLA's own gradient of a windowed maximum is many times slower on CPU.
    """
    return _first_maximum(_windows(x))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_relu_pool(
    x: Float[Array, "batch h w channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
    part: Part = WHOLE,
) -> tuple[Float[Array, "batch h//2 w//2 channels"], Float[Array, " channels"], Float[Array, " channels"]]:
    """Return max_pool_2x2(relu(y)), mean and variance, with y, mean and variance of `normalize_batch`.

    Normalising does not change the order of a channel's values, or reverses it where the scale is negative. So the
    largest y of a window is at the largest sign(scale) x, and all but the statistics and the gradient by `x` can be
    done on a quarter of the values. The result is the same to the bit; the gradient differs only where two values of a
    window are made equal by rounding y, and goes to the larger x. For a scale of 0 all are equal, and the first is it.
    """
    return _normalize_relu_pool_forward(x, scale, bias, part)[0]


def _normalize_relu_pool_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, part: Part) -> tuple[tuple, tuple]:
    mean, var, inverse = _statistics(x, part)
    sign = jnp.where(scale < 0, -1, 1).astype(x.dtype)
    largest = sign * lax.reduce_window(sign * x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    pooled = jax.nn.relu((largest - mean) * (inverse * scale) + bias)
    return (pooled, mean, var), (x, mean, inverse, scale, pooled)


def _normalize_relu_pool_backward(part: Part, saved: tuple, grads: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale, pooled = saved
    largest, winner = _first_maximum(_windows(x), factor=jnp.sign(scale))
    grad = jnp.where(pooled > 0, grads[0], 0)
    bias_grad, scale_grad = grad.sum((0, 1, 2)), (grad * (largest - mean) * inverse).sum((0, 1, 2))
    factor = scale * inverse
    shift, slope = _of_batch((bias_grad, scale_grad), x, part)
    everywhere = factor * shift + (x - mean) * (factor * inverse * slope)
    x_grad = _unpool(factor * grad, winner, x.shape) - _weighed(everywhere, part)
    return x_grad, scale_grad, bias_grad


normalize_relu_pool.defvjp(_normalize_relu_pool_forward, _normalize_relu_pool_backward)


def _windows(x: jax.Array) -> tuple[jax.Array, ...]:
    """Return the four elements of each 2x2 window, row by row: [batch, h//2, w//2, c] each."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(batch, height // 2, 2, width // 2, 2, channels)
    return tuple(x[:, :, row, :, column] for row in (0, 1) for column in (0, 1))


def _first_maximum(candidates: Sequence[jax.Array], *, factor: jax.Array | float = 1) -> tuple[jax.Array, jax.Array]:
    """Return the candidate of the largest `factor` times it, the first of equals, nan where one is, and its index."""
    largest, winner = candidates[0], jnp.zeros(candidates[0].shape, jnp.int8)
    for index, candidate in enumerate(candidates[1:], start=1):
        better = (factor * candidate > factor * largest) | jnp.isnan(candidate)
        largest = jnp.where(better, candidate, largest)
        winner = jnp.where(better, jnp.int8(index), winner)
    return largest, winner


def _unpool(pooled: jax.Array, winner: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return `pooled` [batch, h//2, w//2, c] at the winners of the windows of `shape` [batch, h, w, c], 0 elsewhere."""
    batch, height, width, channels = shape
    element = jnp.arange(4, dtype=winner.dtype).reshape(2, 1, 2, 1)
    spread = jnp.where(winner[:, :, None, :, None] == element, pooled[:, :, None, :, None], 0)
    spread = spread.reshape(batch, height // 2 * 2, width // 2 * 2, channels)
    return jnp.pad(spread, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))


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
    plain &= all(set(np.ravel(options.get(name) or 1)) == {1} for name in PLAIN_OPTIONS)
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
    """Return the gradients by `x`, a convolution with the turned kernel, and by `kernel`, patches times `grad`.

    A patch's elements are rows, one for each shift and channel: [9 c, batch h w]. With the long axis last, copying them
    is copying runs of memory, and the product needs no repacking.
    """
    x, kernel = saved
    kernel_height, kernel_width, _, outputs = kernel.shape
    turned = jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2)
    _, height, width, _ = x.shape
    (top, bottom), (left, right) = _same_padding(kernel)
    padded = jnp.pad(x.transpose(3, 0, 1, 2), ((0, 0), (0, 0), (top, bottom), (left, right)))
    shifts = [
        padded[:, :, row : row + height, column : column + width]
        for row in range(kernel_height)
        for column in range(kernel_width)
    ]
    flat_grad = grad.reshape(-1, outputs)
    patches = jnp.stack(shifts).reshape(-1, flat_grad.shape[0])
    return _convolve(grad, turned), (patches @ flat_grad).reshape(kernel.shape)


_conv_with_matmul_gradient.defvjp(_forward, _backward)
