"""The losses, one value an example, and how many examples are right (S4, S8)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from spec.recipe import Loss


def example_losses(
    logits: Float[Array, "batch outputs"], labels: Int[Array, " batch"], loss: Loss
) -> Float[Array, " batch"]:
    """Return the loss of each example, [batch], in nats and the dtype of `logits` [batch, outputs].

    cross_entropy: -sum_k q_k log softmax(z)_k with q = (1-e) onehot(y) + e/K; cross_entropy_of_softmax: the same with
    softmax(z) in the place of z; binary_cross_entropy: log(1 + exp(z)) - y z, for the one logit z.
    """
    if loss.name == "binary_cross_entropy":
        return optax.sigmoid_binary_cross_entropy(logits[:, 0], labels.astype(logits.dtype))
    if loss.name == "cross_entropy_of_softmax":
        logits = jax.nn.softmax(logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if loss.label_smoothing:
        uniform = -jax.nn.log_softmax(logits).mean(axis=-1)
        losses = (1 - loss.label_smoothing) * losses + loss.label_smoothing * uniform
    return losses


def predictions(logits: Float[Array, "batch outputs"]) -> Int[Array, " batch"]:
    """Return the most probable class of each example, int32 [batch], the first of equals; one logit: is it over 0."""
    if logits.shape[-1] == 1:
        return (logits[:, 0] > 0).astype(jnp.int32)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
