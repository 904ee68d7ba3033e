"""The layers: each function returns its output and the way back, worked out by hand (S3, S5, S7).

Arrays are float64 in torch's layouts: images [batch, channels, height, width], otherwise [batch, features]. Layers that
add up do it by `sums`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from spec.oracle.functions import sigmoid as stable_sigmoid
from spec.oracle.sums import FLOAT64, Sums
from spec.params import KERNEL_SIZE

RUNNING_MOMENTUM = 0.1
BATCHNORM_EPSILON = 1e-5

Back = Callable[[np.ndarray], tuple[np.ndarray, dict[str, np.ndarray]]]


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What a layer gave.

    `back` takes the gradient by the output and returns the gradient by the input and those by the layer's own leaves;
    it is None where there is no way back, in evaluation. `decision` is what the layer chose, None for one that has
    nothing to choose; `batch_stats` the running statistics after it, for BatchNorm.
    """

    output: np.ndarray
    back: Back | None = None
    decision: np.ndarray | None = None
    batch_stats: dict[str, np.ndarray] = field(default_factory=dict)


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, sums: Sums = FLOAT64) -> Applied:
    """Return x W^T + b, [batch, out], for `x` flattened to [batch, in], `weight` [out, in] and `bias` [out] or None.

    With g the gradient by the output: dx = g W, dW = g^T x, db = sum over the batch of g.
    """
    flat = x.reshape(len(x), -1)
    output = sums.product(flat, weight.T)

    def back(grad: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        own = {"weight": sums.product(grad.T, flat)}
        if bias is not None:
            own["bias"] = sums.total(grad, axis=0)
        return sums.product(grad, weight).reshape(x.shape), own

    return Applied(output=output if bias is None else output + bias, back=back)


def convolution(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, sums: Sums = FLOAT64) -> Applied:
    """Return the 3x3 cross-correlation of `x` [batch, in, h, w], padded by 1 with zeros, stride 1: [batch, out, h, w].

    y[n, o, r, s] = b[o] + sum over c, i, j of W[o, c, i, j] x[n, c, r+i-1, s+j-1]. Over the nine shifted images that is
    one matrix product, Y = W X, of [out, 9 in] by [9 in, batch h w]; so dX = W^T g, added back shift by shift, and
    dW = g X^T.
    """
    batch, inputs, height, width = x.shape
    padded = np.pad(x.transpose(1, 0, 2, 3), ((0, 0), (0, 0), (1, 1), (1, 1)))
    shifted = np.stack(_shifts(padded), axis=1).reshape(inputs * KERNEL_SIZE**2, batch * height * width)
    matrix = weight.reshape(len(weight), -1)
    output = (sums.product(matrix, shifted) + bias[:, None]).reshape(-1, batch, height, width)

    def back(grad: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        flat = grad.transpose(1, 0, 2, 3).reshape(len(weight), -1)
        shifted_grad = sums.product(matrix.T, flat).reshape(inputs, KERNEL_SIZE**2, batch, height, width)
        padded_grad = np.zeros_like(padded)
        for index, shift in enumerate(_shifts(padded_grad)):
            shift += shifted_grad[:, index]
        own = {"weight": sums.product(flat, shifted.T).reshape(weight.shape), "bias": sums.total(flat, axis=1)}
        return padded_grad[:, :, 1:-1, 1:-1].transpose(1, 0, 2, 3), own

    return Applied(output=output.transpose(1, 0, 2, 3), back=back)


def _shifts(padded: np.ndarray) -> list[np.ndarray]:
    """Return the nine views [..., h, w] of `padded` [..., h+2, w+2], row by row."""
    height, width = padded.shape[-2] - 2, padded.shape[-1] - 2
    return [padded[..., i : i + height, j : j + width] for i in range(KERNEL_SIZE) for j in range(KERNEL_SIZE)]


def batchnorm(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    running_mean: np.ndarray,
    running_var: np.ndarray,
    sums: Sums = FLOAT64,
) -> Applied:
    """Return w h + b with h = (x - m) / sqrt(v + eps), m and biased v taken over all axes but the channels.

    `x` is [batch, channels, ...], the others [channels]; with one channel that is over everything. The running
    statistics move by 0.1 towards m and the unbiased variance v n/(n-1), n values a channel, as torch's do. With g the
    gradient by the output: dw = sum(g h), db = sum(g), dx = w / sqrt(v + eps) (g - mean(g) - h mean(g h)).
    Raises ValueError for one value a channel, which has no variance. Source: Ioffe and Szegedy, arXiv 1502.03167.
    """
    grouped = x.reshape(len(x), len(weight), -1)
    count = grouped.size // len(weight)
    if count == 1:
        raise ValueError("a batch of one value a channel has no variance; BatchNorm trains on 2 or more")
    mean = sums.total(grouped, axis=(0, 2)) / count
    centred = grouped - mean[:, None]
    var = sums.total(centred**2, axis=(0, 2)) / count
    inverse = 1 / np.sqrt(var + BATCHNORM_EPSILON)
    normalized = centred * inverse[:, None]

    def back(grad: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        grad = grad.reshape(grouped.shape)
        own = {"weight": sums.total(grad * normalized, axis=(0, 2)), "bias": sums.total(grad, axis=(0, 2))}
        through_mean, through_var = own["bias"][:, None] / count, own["weight"][:, None] / count
        x_grad = (weight * inverse)[:, None] * (grad - through_mean - normalized * through_var)
        return x_grad.reshape(x.shape), own

    batch_stats = {
        "running_mean": (1 - RUNNING_MOMENTUM) * running_mean + RUNNING_MOMENTUM * mean,
        "running_var": (1 - RUNNING_MOMENTUM) * running_var + RUNNING_MOMENTUM * var * count / (count - 1),
    }
    output = (normalized * weight[:, None] + bias[:, None]).reshape(x.shape)
    return Applied(output=output, back=back, batch_stats=batch_stats)


def batchnorm_by_running(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, running_mean: np.ndarray, running_var: np.ndarray
) -> Applied:
    """Return w (x - running mean) / sqrt(running variance + eps) + b: BatchNorm in evaluation, shapes as above."""
    grouped = x.reshape(len(x), len(weight), -1)
    normalized = (grouped - running_mean[:, None]) / np.sqrt(running_var + BATCHNORM_EPSILON)[:, None]
    output = (normalized * weight[:, None] + bias[:, None]).reshape(x.shape)
    return Applied(output=output, batch_stats={"running_mean": running_mean, "running_var": running_var})


def relu(x: np.ndarray, gate: np.ndarray | None = None) -> Applied:
    """Return `x` where the gate is open and 0 elsewhere; the gate, bool of the shape of `x`, is x > 0 unless given.

    The derivative is the gate, so 0 at 0.
    """
    gate = x > 0 if gate is None else gate.astype(bool)
    return Applied(output=np.where(gate, x, 0.0), back=lambda grad: (np.where(gate, grad, 0.0), {}), decision=gate)


def sigmoid(x: np.ndarray) -> Applied:
    """Return s = 1 / (1 + exp(-x)), whose derivative is s (1 - s)."""
    output = stable_sigmoid(x)
    return Applied(output=output, back=lambda grad: (grad * output * (1 - output), {}))


def tanh(x: np.ndarray) -> Applied:
    """Return t = tanh(x), whose derivative is 1 - t^2."""
    output = np.tanh(x)
    return Applied(output=output, back=lambda grad: (grad * (1 - output**2), {}))


def max_pool(x: np.ndarray, choice: np.ndarray | None = None) -> Applied:
    """Return one element of each 2x2 window of `x` [batch, c, h, w]: [batch, c, h//2, w//2]; an odd edge is left out.

    `choice`, int8 of the output's shape, is its place in the window, 0 to 3 row by row: the first of the largest unless
    given. The gradient goes to that element alone.
    """
    batch, channels, height, width = x.shape
    rows, columns = height // 2, width // 2
    windows = x[:, :, : 2 * rows, : 2 * columns].reshape(batch, channels, rows, 2, columns, 2)
    windows = windows.transpose(0, 1, 2, 4, 3, 5).reshape(batch, channels, rows, columns, 4)
    choice = (windows.argmax(axis=-1) if choice is None else choice).astype(np.int8)
    where = choice[..., None].astype(np.int64)

    def back(grad: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        windows_grad = np.zeros(windows.shape)
        np.put_along_axis(windows_grad, where, grad[..., None], axis=-1)
        in_place = windows_grad.reshape(batch, channels, rows, columns, 2, 2).transpose(0, 1, 2, 4, 3, 5)
        x_grad = np.zeros(x.shape)
        x_grad[:, :, : 2 * rows, : 2 * columns] = in_place.reshape(batch, channels, 2 * rows, 2 * columns)
        return x_grad, {}

    return Applied(output=np.take_along_axis(windows, where, axis=-1)[..., 0], back=back, decision=choice)


def dropout(x: np.ndarray, rate: float, mask: np.ndarray) -> Applied:
    """Return x m / (1 - rate) for the bool mask m, of the shape of `x`, of what is kept."""
    factor = mask.astype(bool) / (1 - rate)
    return Applied(output=x * factor, back=lambda grad: (grad * factor, {}), decision=mask.astype(bool))
